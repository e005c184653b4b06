// SPDX-License-Identifier: MIT
/// Attention over a list of segments: the one operation through which every streaming method of the
/// library reads its cache. The contract is here; backend/cpu/attend.hpp does the work.
#pragma once

#include <span>

#include "sluice/attention/attention_query.hpp"
#include "sluice/attention/variant.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/backend.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/view.hpp"

namespace sluice {

/// Computes, for each query row and head, out = sum softmax(score)_j v_j over the visible keys of
/// all segments and lse = ln sum e^score.
///
/// score_j = transform(sm_scale * <R(reader position) q, R(key position) k_j>), accumulated in
/// float32. Query head h reads KV head h / (num_qo_heads / num_kv_heads). Keys are visible if they
/// lie in their segment's visible prefix and variant.visibility says so. query.kv_heads limits a
/// call to some KV heads and their query heads; transform and sink are given the head's number in
/// the layer. The sink term enters the denominator once, however keys are split; lse does not
/// contain it. A row that sees nothing gives out = 0 and lse = -infinity. The result does not
/// depend on the team's size, bit for bit.
///
/// out: [T, num_qo_heads, value_dim]; lse: [T, num_qo_heads] or null. Rows of any subset of a
/// chunk's queries may be passed, as several calls. Allocates nothing. Extents must fit the
/// workspace (asserted).
template <class Key, class Value, Visibility Mask, ScoreTransform Transform, SinkTerm Sink,
          Backend Tag>
void attend(const AttentionQuery& query, std::span<const Segment<Key, Value>> segments,
            const AttentionVariant<Mask, Transform, Sink>& variant, HeadsView<float> out,
            float* lse, AttentionWorkspace<Tag>& workspace, ThreadTeam& team, Tag backend);

}  // namespace sluice

#include "sluice/backend/cpu/attend.hpp"  // the specialisation for sluice::cpu
#if SLUICE_KERNELS_INCLUDED
#include "sluice/backend/cpu/attend_work.hpp"  // its kernels
#endif
