// SPDX-License-Identifier: MIT
/// Products of a weight matrix with several vectors, by cuBLASLt: prefill and batches. A program
/// that uses this header links cublasLt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>

#include <cublasLt.h>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/memory.cuh"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"

namespace sluice {

/// \throws Error(kDevice) unless `status` is CUBLAS_STATUS_SUCCESS.
inline void check_cublas(cublasStatus_t status, const char* call,
                         std::source_location at = std::source_location::current()) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw Error(ErrorCode::kDevice,
              {std::string("cuBLASLt: ") + cublasLtGetStatusName(status),
               std::string(at.file_name()) + ":" + std::to_string(at.line()), call,
               "CUBLAS_STATUS_SUCCESS", std::to_string(static_cast<int>(status))});
}

/// Y = X W^T (+ Y), sums in float32: X [count, cols] and W [rows, cols] of Element, Y [count, rows]
/// float32, all row after row. One stream at a time: products share a workspace.
///
/// The first product of new extents asks cuBLASLt how to do it and allocates on the host; later
/// ones do not. Which algorithm is taken depends on extents and device alone, and so do the bits.
template <class Element>
class MatrixProducts {
  static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, f16>);

 public:
  /// \throws Error(kDevice).
  MatrixProducts() : workspace_(kWorkspaceBytes) {
    check_cublas(cublasLtCreate(&handle_), "cublasLtCreate");
  }
  ~MatrixProducts() {
    for (auto& [extents, plan] : plans_) destroy(plan);
    static_cast<void>(cublasLtDestroy(handle_));
  }
  MatrixProducts(const MatrixProducts&) = delete;
  MatrixProducts& operator=(const MatrixProducts&) = delete;

  /// add: Y's old values are added. stride: elements between rows of Y, 0: `rows`. May be captured.
  /// \throws Error(kDevice).
  void launch(const Element* w, std::int64_t rows, std::int64_t cols, const Element* x,
              std::int64_t count, float* y, bool add, cudaStream_t stream,
              std::int64_t stride = 0) {
    const Plan& plan = plan_of({rows, cols, count, stride > 0 ? stride : rows});
    const float one = 1;
    const float zero = 0;
    check_cublas(cublasLtMatmul(handle_, plan.operation, &one, w, plan.w, x, plan.x,
                                add ? &one : &zero, y, plan.y, y, plan.y, &plan.algorithm,
                                workspace_.data(), kWorkspaceBytes, stream),
                 "cublasLtMatmul");
  }

 private:
  using Extents = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
  struct Plan {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t w = nullptr;
    cublasLtMatrixLayout_t x = nullptr;
    cublasLtMatrixLayout_t y = nullptr;
    cublasLtMatmulAlgo_t algorithm{};
  };
  static constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;

  static void destroy(Plan& plan) {
    if (plan.operation != nullptr) static_cast<void>(cublasLtMatmulDescDestroy(plan.operation));
    const cublasLtMatrixLayout_t layouts[] = {plan.w, plan.x, plan.y};
    for (const cublasLtMatrixLayout_t layout : layouts)
      if (layout != nullptr) static_cast<void>(cublasLtMatrixLayoutDestroy(layout));
  }

  const Plan& plan_of(const Extents& extents) {
    const auto found = plans_.find(extents);
    if (found != plans_.end()) return found->second;
    const auto [rows, cols, count, stride] = extents;
    Plan& plan = plans_[extents];
    try {
      make(plan, static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(cols),
           static_cast<std::uint64_t>(count), stride);
    } catch (...) {
      destroy(plan);
      plans_.erase(extents);
      throw;
    }
    return plan;
  }

  void make(Plan& plan, std::uint64_t rows, std::uint64_t cols, std::uint64_t count,
            std::int64_t stride) {
    constexpr cudaDataType_t kType = std::is_same_v<Element, bf16> ? CUDA_R_16BF : CUDA_R_16F;
    check_cublas(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                 "cublasLtMatmulDescCreate");
    // cuBLAS counts columns first: our Y is its Y^T = W X^T.
    const cublasOperation_t transposed = CUBLAS_OP_T;
    check_cublas(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                &transposed, sizeof(transposed)),
                 "cublasLtMatmulDescSetAttribute");
    check_cublas(
        cublasLtMatrixLayoutCreate(&plan.w, kType, cols, rows, static_cast<std::int64_t>(cols)),
        "cublasLtMatrixLayoutCreate");
    check_cublas(
        cublasLtMatrixLayoutCreate(&plan.x, kType, cols, count, static_cast<std::int64_t>(cols)),
        "cublasLtMatrixLayoutCreate");
    check_cublas(cublasLtMatrixLayoutCreate(&plan.y, CUDA_R_32F, rows, count, stride),
                 "cublasLtMatrixLayoutCreate");
    cublasLtMatmulPreference_t preference = nullptr;
    check_cublas(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
    cublasLtMatmulHeuristicResult_t result{};
    int found = 0;
    cublasStatus_t status =
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &kWorkspaceBytes, sizeof(kWorkspaceBytes));
    if (status == CUBLAS_STATUS_SUCCESS)
      status = cublasLtMatmulAlgoGetHeuristic(handle_, plan.operation, plan.w, plan.x, plan.y,
                                              plan.y, preference, 1, &result, &found);
    static_cast<void>(cublasLtMatmulPreferenceDestroy(preference));
    check_cublas(status, "cublasLtMatmulAlgoGetHeuristic");
    if (found == 0) check_cublas(CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmulAlgoGetHeuristic");
    plan.algorithm = result.algo;
  }

  cublasLtHandle_t handle_ = nullptr;
  Buffer<std::uint8_t, cuda> workspace_;
  std::map<Extents, Plan> plans_;
};

}  // namespace sluice
