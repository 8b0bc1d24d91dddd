// The types whose memory torch's headers have code for that is compiled into the extension wherever it uses tensors,
// under whichever torch it runs: what this file is compiled to says, for debuggers, where in them everything lies. The
// node of src/bindings/autograd.cpp is not among them: it is made only in the minor version that it was compiled for.

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>
#include <c10/core/SymNodeImpl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/variable.h>

struct Touched {
  at::Tensor *tensor;
  c10::TensorImpl *tensor_impl;
  c10::UndefinedTensorImpl *undefined;
  c10::StorageImpl *storage_impl;
  c10::Storage *storage;
  torch::autograd::AutogradMeta *autograd_meta;
  python_error *error;
  c10::Error *cpp_error;
  c10::Scalar *scalar;
  c10::SymInt *sym_int;
  c10::SymNodeImpl *sym_node;
  c10::IValue *value;
  c10::TensorOptions *options;
  c10::Device *device;
  c10::DispatchKeySet *keys;
  at::Generator *generator;
  c10::OptionalArrayRef<int64_t> *sizes;
  c10::ArrayRef<at::Tensor> *tensors;
  std::optional<at::Tensor> *optional_tensor;
  std::optional<at::ScalarType> *optional_type;
  std::optional<c10::Scalar> *optional_scalar;
  c10::MemoryFormat *memory_format;
  c10::Layout *layout;
};

Touched touched;
