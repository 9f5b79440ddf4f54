# Libraries that are headers only, of whatever version the system has, else fetched and pinned:
#   chai_find_onnxruntime_headers(VARIABLE)   the folder of onnxruntime_c_api.h, or an empty string
#   chai_find_json_headers(VARIABLE)          the folder of nlohmann/json.hpp
#   chai_find_doctest_headers(VARIABLE)       the folder of doctest/doctest.h
include("${CMAKE_CURRENT_LIST_DIR}/FetchHeaders.cmake")

# Any version from 1.18 on will do: the library asks the runtime for the C API of that version only. The sets
# are Debian 13's 1.21.0 and 1.23.2, below those of Debian 13 and of its successor in the making.
macro(chai_find_onnxruntime_headers variable)
  chai_find_headers(${variable} ONNXRUNTIME
    FILE onnxruntime_c_api.h
    SYSTEM_FOLDERS onnxruntime onnxruntime/core/session
    URL https://github.com/microsoft/onnxruntime/releases/download/v1.23.2/onnxruntime-linux-x64-1.23.2.tgz
    SHA256 1fa4dcaef22f6f7d5cd81b28c2800414350c10116f5fdd46a2160082551c5f9b
    ARCHIVE_FOLDER onnxruntime-linux-x64-1.23.2/include
    DEBIAN_PACKAGE libonnxruntime-dev
    DEBIAN_FOLDER onnxruntime
    HEADERS onnxruntime_*.h
    SETS 6c77556a675858bc670c4dde4b2f69c91515be8a79edf7284e257a647473a4c4
         d5fcf134054680797f5c32030dbed9c1c2e4df5bc0dd951b8251e6d3e634708e)
endmacro()

macro(chai_find_json_headers variable)
  chai_find_headers(${variable} JSON
    FILE nlohmann/json.hpp
    URL https://github.com/nlohmann/json/releases/download/v3.11.3/json.hpp
    SHA256 9bea4c8066ef4a1c206b2be5a36302f8926f7fdc6087af5d20b417d0cf103ea6
    DEBIAN_PACKAGE nlohmann-json3-dev
    DEBIAN_FOLDER nlohmann
    HEADERS *.hpp
    SETS c5779020abfeade5701499b5b5354cb0f70696eed61f3d2017823a556187419f
         28932afe2555af37b8baee8939a4ba56308efac05b7a5a99f50a6a22db17c238)
endmacro()

macro(chai_find_doctest_headers variable)
  chai_find_headers(${variable} DOCTEST
    FILE doctest/doctest.h
    URL https://raw.githubusercontent.com/doctest/doctest/v2.4.11/doctest/doctest.h
    SHA256 44faa038e9c3f9728efbda143748d01124ea0a27f4bf78f35a15d8fab2e039fb
    DEBIAN_PACKAGE doctest-dev
    DEBIAN_FOLDER doctest
    HEADERS doctest.h
    SETS a0108012f677e96123dbd061ab7545e00500c4347e1a96c6c8cce42404811337
         cb8e91becdcd199a74f8f38096181e0620675e08b507ce604a6b141b5cda820f)
endmacro()
