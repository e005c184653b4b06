// SPDX-License-Identifier: MIT
/// A stream's model and session by backend tag. A program that names them through these templates
/// is the same source for every backend: it changes the tag, and includes the header in which that
/// backend specialises backend_traits.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "sluice/cache/kv_element.hpp"
#include "sluice/core/backend.hpp"
#include "sluice/core/error.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/stream/session.hpp"

namespace sluice {

/// What a backend's streams are made of. A specialisation has the members of that for cpu; its
/// Session has Session's verbs, with the same results to rounding, and throws Error(kUnsupported)
/// where the backend does not do what is asked.
template <Backend Tag>
struct backend_traits;

template <>
struct backend_traits<cpu> {
  static constexpr std::string_view kName = "cpu";
  /// Whether there are sessions whose keys and values are of this type.
  template <class Element>
  static constexpr bool kStores = KvElement<Element>;

  /// Weights where the backend reads them; sessions share them.
  template <KvElement Element>
  using Model = Decoder;
  template <KvElement Element>
  using Session = sluice::Session<Element>;

  /// \throws Error(kDevice) where the machine has no such device to run on. The CPU is one, 0.
  static void require_device(int device = kCurrentDevice) {
    if (device != 0 && device != kCurrentDevice)
      throw Error(ErrorCode::kDevice,
                  {"no such device", "the CPU", "device", "0", std::to_string(device)});
  }
  /// Brings a loaded model to where sessions on that device read it. \throws Error(kUnsupported)
  /// for a model that the backend does not run; Error(kDevice).
  template <KvElement Element>
  static std::shared_ptr<const Model<Element>> place(std::shared_ptr<const Decoder> model,
                                                     int device = kCurrentDevice) {
    require_device(device);
    return model;
  }
};

/// Session on a backend; Element is the type of keys and values.
template <Backend Tag, KvElement Element = f16>
using SessionOn = typename backend_traits<Tag>::template Session<Element>;

/// The model of SessionOn<Tag, Element>.
template <Backend Tag, KvElement Element = f16>
using ModelOn = typename backend_traits<Tag>::template Model<Element>;

/// Brings a loaded model to a backend's device, 0 being the first: for several sessions that share
/// it, or for another device than the current one. Sessions run where their model lies, whatever
/// device is current when they are made or used. One session on the current device may as well be
/// given the loaded model itself. \throws Error(kDevice) where there is no such device.
template <Backend Tag, KvElement Element = f16>
std::shared_ptr<const ModelOn<Tag, Element>> place_model(std::shared_ptr<const Decoder> model,
                                                         int device = kCurrentDevice) {
  return backend_traits<Tag>::template place<Element>(std::move(model), device);
}

}  // namespace sluice
