# SPDX-License-Identifier: MIT
#
# sluice::cuda_session: the device's half of backend/cuda/session.hpp and duplex_session.hpp in a
# static library, so that programs stay with the host compiler. It is built when something links it, for the architectures
# in CMAKE_CUDA_ARCHITECTURES. It is not installed: it belongs to one toolkit and its GPUs.
include_guard()
find_package(CUDAToolkit REQUIRED)

set(cuda_session_sources "")
foreach(element IN ITEMS bf16 f16)
  set(source ${PROJECT_BINARY_DIR}/cuda_session/${element}.cu)
  # Caches of codes have the weights that CudaWeightsOf names. In one file with what else has those:
  # most kernels are theirs too, and are compiled once.
  set(sessions_of_codes "")
  if(element STREQUAL "f16")
    foreach(cache IN ITEMS std::int8_t sluice::fp8_e4m3)
      string(APPEND sessions_of_codes
             "template class sluice::CudaDeviceSession<sluice::f16, ${cache}>;\n")
    endforeach()
  endif()
  file(CONFIGURE OUTPUT ${source} CONTENT
"#include <sluice/backend/cuda/device_duplex.cuh>
template class sluice::CudaDeviceModel<sluice::${element}>;
template class sluice::CudaDeviceSession<sluice::${element}>;
template class sluice::CudaDeviceDuplex<sluice::${element}>;
${sessions_of_codes}")
  list(APPEND cuda_session_sources ${source})
endforeach()

add_library(sluice_cuda_session STATIC EXCLUDE_FROM_ALL ${cuda_session_sources})
add_library(sluice::cuda_session ALIAS sluice_cuda_session)
# Otherwise CMake 3.25 turns extensions off, with a -std=c++17 behind our -std=c++20.
set_target_properties(sluice_cuda_session PROPERTIES CUDA_EXTENSIONS ON)
# The runtime is named, because a program of a project without CUDA is linked as C++.
if(CMAKE_CUDA_RUNTIME_LIBRARY STREQUAL "Shared")
  set(cuda_session_runtime CUDA::cudart)
else()
  set(cuda_session_runtime CUDA::cudart_static)
endif()
target_link_libraries(
  sluice_cuda_session PRIVATE sluice::cuda PUBLIC CUDA::cublasLt ${cuda_session_runtime})
