// SPDX-License-Identifier: MIT
/// Every header of the library that needs Eigen alone. The readers of files and the tokenisers
/// (sluice/io/, sluice/model/load*.hpp) are included by name and need the target sluice::io.
#pragma once

#include "sluice/core/config.hpp"  // first: it tells nvcc to stop

#include "sluice/core/atomic_file.hpp"
#include "sluice/core/backend.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/checksum.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/signal.hpp"
#include "sluice/core/spsc_ring.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/token.hpp"
#include "sluice/core/version.hpp"
#include "sluice/core/view.hpp"

#include "sluice/position/alibi.hpp"
#include "sluice/position/group_layout.hpp"
#include "sluice/position/position.hpp"
#include "sluice/position/rotary.hpp"
#include "sluice/position/vision_positions.hpp"

#include "sluice/cache/group.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/page_pool.hpp"
#include "sluice/cache/paged_kv_cache.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/cache/segment.hpp"

#include "sluice/attention/attend.hpp"
#include "sluice/attention/attention_mass.hpp"
#include "sluice/attention/draft_tree.hpp"
#include "sluice/attention/group_mask.hpp"
#include "sluice/attention/reference.hpp"
#include "sluice/attention/softmax_state.hpp"
#include "sluice/attention/variant.hpp"

#include "sluice/nn/activation.hpp"
#include "sluice/nn/embedding.hpp"
#include "sluice/nn/linear.hpp"
#include "sluice/nn/norm.hpp"
#include "sluice/nn/quantised_blocks.hpp"
#include "sluice/nn/weight_matrix.hpp"

#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/model/decoder_config.hpp"

#include "sluice/stream/clock.hpp"
#include "sluice/stream/duplex.hpp"
#include "sluice/stream/duplex_engine.hpp"
#include "sluice/stream/duplex_metrics.hpp"
#include "sluice/stream/event_log.hpp"
#include "sluice/stream/lagging.hpp"
#include "sluice/stream/latency_histogram.hpp"
#include "sluice/stream/likelihood.hpp"
#include "sluice/stream/metrics.hpp"
#include "sluice/stream/policy.hpp"
#include "sluice/stream/sampler.hpp"
#include "sluice/stream/session.hpp"
#include "sluice/stream/unit_queue.hpp"
