# SPDX-License-Identifier: MIT
include_guard()

# Headers that need sluice::io. Everything else compiles with Eigen alone; the structure test holds
# the headers to this.
set(SLUICE_IO_HEADER_REGEX
    "/sluice/(io/.*|model/load[^/]*|model/detail/collect_weights)\\.hpp$")

# Those of them that need sluice::audio.
set(SLUICE_AUDIO_HEADER_REGEX "/sluice/io/sound_file\\.hpp$")

# sluice_find_part(<PART> <found> "<package>|<version>|<Debian package>"...)
#
# Looks for the packages of an optional part as SLUICE_<PART> asks: OFF looks for nothing, AUTO
# names what is missing and leaves the part out, ON fails. Sets <found> to ON or OFF.
# A macro, because packages found inside a function would lose their variables.
macro(sluice_find_part part found)
  set(${found} OFF)
  set(part_missing "")
  if(SLUICE_${part})  # AUTO, ON or any other way to say yes
    foreach(part_entry IN ITEMS ${ARGN})
      string(REPLACE "|" ";" part_entry "${part_entry}")
      list(GET part_entry 0 part_package)
      list(GET part_entry 1 part_version)
      list(GET part_entry 2 part_debian)
      if(NOT TARGET ${part_package}::${part_package})
        find_package(${part_package} ${part_version} QUIET)
        if(NOT ${part_package}_FOUND)
          list(APPEND part_missing "${part_package} ${part_version} (Debian: ${part_debian})")
        endif()
      endif()
    endforeach()
    if(NOT part_missing)
      set(${found} ON)
    else()
      list(JOIN part_missing ", " part_missing)
      if("${SLUICE_${part}}" STREQUAL "AUTO")
        message(STATUS "sluice: SLUICE_${part} is left out, not found: ${part_missing}")
      else()
        message(FATAL_ERROR "SLUICE_${part} is ON, not found: ${part_missing}")
      endif()
    endif()
  endif()
endmacro()

# sluice_needs_io(<file> <result>): whether a source file names a header that needs sluice::io.
function(sluice_needs_io file result)
  file(STRINGS "${file}" lines REGEX "^ *#include [<\"]sluice/(io/|model/load)")
  if(lines)
    set(${result} ON PARENT_SCOPE)
  else()
    set(${result} OFF PARENT_SCOPE)
  endif()
endfunction()

# sluice_find_cuda(<found>): enables CUDA as SLUICE_CUDA asks, for every architecture that a kernel
# has a path of its own for. A macro, because a language enabled in a function loses its variables.
macro(sluice_find_cuda found)
  set(${found} OFF)
  # AUTO serves our own programs; whoever insists wants sluice::cuda_session.
  if(SLUICE_CUDA AND (found_tests OR found_bench OR found_examples
                      OR NOT "${SLUICE_CUDA}" STREQUAL "AUTO"))
    if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
      find_program(CMAKE_CUDA_COMPILER nvcc HINTS ENV CUDA_PATH PATHS /usr/local/cuda
                   PATH_SUFFIXES bin)
    endif()
    # What AUTO finds must be able to build it all: Debian's own nvcc is too old, and a toolkit may
    # lack the libraries.
    set(cuda_compiler "${CMAKE_CUDA_COMPILER}")
    if(NOT cuda_compiler)
      set(cuda_compiler "$ENV{CUDACXX}")
    endif()
    set(cuda_release "")
    if(cuda_compiler AND "${SLUICE_CUDA}" STREQUAL "AUTO" AND NOT SLUICE_SANITIZE)
      execute_process(COMMAND "${cuda_compiler}" --version
                      OUTPUT_VARIABLE cuda_release RESULT_VARIABLE cuda_status ERROR_QUIET)
      if(cuda_release MATCHES "release ([0-9]+\\.[0-9]+)")
        set(cuda_release ${CMAKE_MATCH_1})
      else()  # not nvcc: enable_language() says what is wrong with it
        set(cuda_release "")
      endif()
    endif()
    if("${SLUICE_CUDA}" STREQUAL "AUTO" AND SLUICE_SANITIZE)
      message(STATUS "sluice: SLUICE_CUDA is left out, a sanitizer build has no use for it")
    elseif(cuda_release AND cuda_release VERSION_LESS 12.4)
      unset(CMAKE_CUDA_COMPILER CACHE)
      message(STATUS "sluice: SLUICE_CUDA is left out, it needs nvcc 12.4: ${cuda_compiler} is "
                     "${cuda_release}")
    elseif(cuda_compiler OR NOT "${SLUICE_CUDA}" STREQUAL "AUTO")
      if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
        set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real)
      endif()
      enable_language(CUDA)
      find_package(CUDAToolkit QUIET)
      if(TARGET CUDA::cublasLt)
        set(${found} ON)
      elseif("${SLUICE_CUDA}" STREQUAL "AUTO")
        message(STATUS "sluice: SLUICE_CUDA is left out, not found: cublasLt (CUDA toolkit)")
      else()
        message(FATAL_ERROR "SLUICE_CUDA is ${SLUICE_CUDA}, not found: cublasLt (CUDA toolkit)")
      endif()
    else()
      unset(CMAKE_CUDA_COMPILER CACHE)
      message(STATUS "sluice: SLUICE_CUDA is left out, not found: nvcc 12.4 (CUDA toolkit)")
    endif()
  endif()
endmacro()
