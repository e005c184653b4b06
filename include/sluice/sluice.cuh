// SPDX-License-Identifier: MIT
/// Everything that a .cu file may include: the CUDA backend and the headers that it shares with
/// the CPU. Not the CPU's own: Eigen must not be compiled by nvcc.
#pragma once

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/chunk_attention.cuh"
#include "sluice/backend/cuda/decode_attention.cuh"
#include "sluice/backend/cuda/decode_step.cuh"
#include "sluice/backend/cuda/decoder.cuh"
#include "sluice/backend/cuda/decoder_kernels.cuh"
#include "sluice/backend/cuda/device_duplex.cuh"
#include "sluice/backend/cuda/device_session.cuh"
#include "sluice/backend/cuda/duplex.cuh"
#include "sluice/backend/cuda/hopper_attention.cuh"
#include "sluice/backend/cuda/kind_decoder.cuh"
#include "sluice/backend/cuda/kv_codes.cuh"
#include "sluice/backend/cuda/matrix_columns.cuh"
#include "sluice/backend/cuda/matrix_product.cuh"
#include "sluice/backend/cuda/matrix_vector.cuh"
#include "sluice/backend/cuda/memory.cuh"
#include "sluice/backend/cuda/quantised_columns.cuh"
#include "sluice/backend/cuda/quantised_vector.cuh"
#include "sluice/backend/cuda/segment_attention.cuh"
#include "sluice/backend/cuda/tile_attention.cuh"
#include "sluice/backend/cuda/variant.cuh"
#include "sluice/backend/cuda/vision_tower.cuh"
