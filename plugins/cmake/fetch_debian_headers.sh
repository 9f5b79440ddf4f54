#!/bin/sh
# fetch_debian_headers.sh PACKAGE FOLDER DESTINATION: the folder /usr/include/FOLDER of a Debian package, through apt
# and the mirror this machine already uses, without touching its package lists or installing anything. Debian 13 is
# the first release with all packages that the build asks for.
set -eu
package=$1 folder=$2 destination=$3
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -E '/debian/?$' | sort -u | head -n 1)
test -n "$mirror" || { echo "no Debian mirror is configured"; exit 1; }

fetch() {
  suite=$1
  mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/unpacked"
  printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$mirror" "$suite" >"$work/sources.list"
  set -- -qq -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o Acquire::Languages=none \
    -o APT::Sandbox::User="$(id -un)"
  apt-get "$@" update && (cd "$work" && apt-get "$@" download "$package/$suite") || return 1
  dpkg-deb -x "$work/$package"_*.deb "$work/unpacked"
}

fetch trixie || { rm -rf "$work"/*; fetch sid; }
mv "$work/unpacked/usr/include/$folder" "$destination"
