# SPDX-License-Identifier: MIT
#
# sluice::kernels: the CPU kernels in a static library. It is built with the flags of the project that
# it is part of, when something links it; target_compile_options(sluice_kernels PRIVATE
# -march=native) makes the kernels, and nothing else, as fast as this machine allows. It is not
# installed: a library fits one architecture, the package fits all of them.
include_guard()

set(kernel_sources "")
foreach(header IN ITEMS attend_work linear)
  set(source ${PROJECT_BINARY_DIR}/kernels/${header}.cpp)
  file(CONFIGURE OUTPUT ${source} CONTENT "#define SLUICE_KERNELS_IMPLEMENTATION
#include <sluice/backend/cpu/${header}.hpp>\n")
  list(APPEND kernel_sources ${source})
endforeach()

add_library(sluice_kernels STATIC EXCLUDE_FROM_ALL ${kernel_sources})
add_library(sluice::kernels ALIAS sluice_kernels)
target_compile_definitions(sluice_kernels PUBLIC SLUICE_COMPILED_KERNELS=1)
target_link_libraries(sluice_kernels PUBLIC sluice)

# What our own programs link: the compiled kernels, with our flags, or the headers alone.
function(sluice_own_kernels)
  add_library(sluice_own_kernels INTERFACE)
  target_link_libraries(sluice_kernels PRIVATE $<BUILD_INTERFACE:sluice_own_flags>)
  if(SLUICE_LINK_KERNELS)
    target_link_libraries(sluice_own_kernels INTERFACE sluice_kernels)
  endif()
endfunction()
