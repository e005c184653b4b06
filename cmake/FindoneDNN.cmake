# SPDX-License-Identifier: MIT
#
# oneDNN: oneDNN::oneDNN. Its own package file (Debian: libdnnl-dev) asks for OpenCL's headers too,
# which nothing here needs.
include(FindPackageHandleStandardArgs)

find_path(oneDNN_INCLUDE_DIR oneapi/dnnl/dnnl.h)
find_library(oneDNN_LIBRARY NAMES dnnl)
mark_as_advanced(oneDNN_INCLUDE_DIR oneDNN_LIBRARY)

set(oneDNN_VERSION "")
set(onednn_libraries "${oneDNN_LIBRARY}")
if(oneDNN_INCLUDE_DIR)
  file(STRINGS "${oneDNN_INCLUDE_DIR}/oneapi/dnnl/dnnl_version.h" onednn_lines
       REGEX "define DNNL_VERSION_(MAJOR|MINOR|PATCH)")
  string(REGEX MATCHALL "[0-9]+" oneDNN_VERSION "${onednn_lines}")
  list(JOIN oneDNN_VERSION "." oneDNN_VERSION)
  # How many threads a product has is asked of the library that its threads come from.
  file(STRINGS "${oneDNN_INCLUDE_DIR}/oneapi/dnnl/dnnl_config.h" onednn_lines
       REGEX "define DNNL_CPU_THREADING_RUNTIME DNNL_RUNTIME_OMP")
  if(onednn_lines)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      list(APPEND onednn_libraries gomp)
    else()
      find_package(OpenMP QUIET COMPONENTS CXX)
      list(APPEND onednn_libraries ${OpenMP_CXX_LIBRARIES})
    endif()
  endif()
endif()

find_package_handle_standard_args(
  oneDNN
  REQUIRED_VARS oneDNN_LIBRARY oneDNN_INCLUDE_DIR
  VERSION_VAR oneDNN_VERSION
  HANDLE_VERSION_RANGE)

if(oneDNN_FOUND AND NOT TARGET oneDNN::oneDNN)
  add_library(oneDNN::oneDNN INTERFACE IMPORTED)
  set_target_properties(oneDNN::oneDNN PROPERTIES
    INTERFACE_LINK_LIBRARIES "${onednn_libraries}"
    INTERFACE_INCLUDE_DIRECTORIES "${oneDNN_INCLUDE_DIR}")
endif()
