#!/bin/sh
# Headers of Debian's libonnxruntime-dev into the folder $1, through apt and the mirror this machine already
# uses, without touching its package lists or installing anything. Debian 13 is the first release with it.
set -eu
destination=$1
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -E '/debian/?$' | sort -u | head -n 1)
test -n "$mirror" || { echo "no Debian mirror is configured"; exit 1; }

fetch() {
  mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/unpacked"
  printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$mirror" "$1" >"$work/sources.list"
  set -- "$1" -qq -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o Acquire::Languages=none \
    -o APT::Sandbox::User="$(id -un)"
  suite=$1
  shift
  apt-get "$@" update && (cd "$work" && apt-get "$@" download "libonnxruntime-dev/$suite") || return 1
  dpkg-deb -x "$work"/libonnxruntime-dev_*.deb "$work/unpacked"
}

fetch trixie || { rm -rf "$work"/*; fetch sid; }
mv "$work/unpacked/usr/include/onnxruntime" "$destination"
