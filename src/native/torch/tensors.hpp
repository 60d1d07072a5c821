#pragma once

#include <ATen/Functions.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/irange.h>

#include "backend.hpp"

namespace pneumo {

inline int64_t bytes_of(const at::Tensor& tensor) { return static_cast<int64_t>(tensor.nbytes()); }

/// A contiguous tensor with the place of `tensor`, where it is one itself, else new and of the same shape.
inline at::Tensor room_for(const at::Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : at::empty(tensor.sizes(), tensor.options());
}

/// Copy what arrived in `rooms` to where it was wanted.
inline void deliver(const Tensors& outputs, const Tensors& rooms) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    for (const auto i : c10::irange(outputs.size())) {
        if (!outputs[i].is_same(rooms[i])) outputs[i].copy_(rooms[i]);
    }
}

inline std::vector<void*> pointers(const Tensors& tensors) {
    std::vector<void*> addresses;
    for (const auto& tensor : tensors) addresses.push_back(tensor.data_ptr());
    return addresses;
}

inline std::vector<const void*> const_pointers(const Tensors& tensors) {
    std::vector<const void*> addresses;
    for (const auto& tensor : tensors) addresses.push_back(tensor.const_data_ptr());
    return addresses;
}

/// The parts of a contiguous buffer that begin at multiples of `bytes`.
inline std::vector<void*> parts(const at::Tensor& tensor, int count, size_t bytes) {
    std::vector<void*> addresses;
    for (const auto k : c10::irange(count))
        addresses.push_back(static_cast<std::byte*>(tensor.data_ptr()) + static_cast<size_t>(k) * bytes);
    return addresses;
}

inline Tensors contiguous(const Tensors& tensors) {
    Tensors result;
    const at::AutoDispatchBelowADInplaceOrView guard;
    for (const auto& tensor : tensors) result.push_back(tensor.contiguous());
    return result;
}

inline Tensors rooms_for(const Tensors& tensors) {
    Tensors result;
    for (const auto& tensor : tensors) result.push_back(room_for(tensor));
    return result;
}

inline void check_tensor(const char* operation, const at::Tensor& tensor) {
    TORCH_CHECK(tensor.device().is_cpu(), "pneumo: ", operation, " needs CPU tensors, this one is on ",
                tensor.device());
    TORCH_CHECK(tensor.layout() == at::kStrided, "pneumo: ", operation, " does not support ", tensor.layout(),
                " tensors");
}

/// A tensor that is written to: no two of its elements may share memory, as those of an expanded one do.
inline void check_output(const char* operation, const at::Tensor& tensor) {
    check_tensor(operation, tensor);
    TORCH_CHECK(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, "pneumo: ", operation,
                " cannot write to a tensor whose elements share memory, as those of an expanded one do");
}

inline void check_sizes(const char* operation, const Tensors& tensors, const at::Tensor& like) {
    for (const auto& tensor : tensors) {
        TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "pneumo: ", operation, " got tensors of ",
                    tensor.scalar_type(), " and ", like.scalar_type());
        TORCH_CHECK(tensor.numel() == like.numel(), "pneumo: ", operation, " got tensors of ", tensor.numel(), " and ",
                    like.numel(), " elements");
    }
}

/// Outputs that have to have the type and the number of elements of `like`.
inline void check_same(const char* operation, const Tensors& tensors, const at::Tensor& like) {
    for (const auto& tensor : tensors) check_output(operation, tensor);
    check_sizes(operation, tensors, like);
}

/// All that is needed to start an operation: `body` runs in the engine and must capture what it uses by value.
struct PneumoBackend::Issue {
    c10d::OpType type;
    const char* title;
    Tensors inputs;
    Tensors outputs;
    Operation::Body body;
    std::chrono::milliseconds timeout = c10d::kUnsetTimeout;
    bool async = true;
    std::vector<Tensors> lists = {};  // the outputs, where the Future's value is a list of lists
    bool in_order = true;             // with the other collectives of the group
};

}  // namespace pneumo
