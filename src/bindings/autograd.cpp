// The node that stands for one of our operations in autograd's graph: its backward pass calls Rust, and no Python
// unless Rust does. And the question whether an operation may be called so, for which Python needs many calls.

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::CppNode;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Most tensors that one operation takes, or saves.
constexpr size_t MOST = 8;

using Needed = std::array<bool, MOST>;

// As src/bindings/autograd.rs has it.
struct Operation {
  // Gradients of the inputs, each null or given away, from that of the output and what was saved, null where that
  // was nothing. Gives null, or what went wrong.
  void *(*backward)(const void *state, const at::Tensor *gy, const at::Tensor *const *saved, const bool *needed,
                    at::Tensor **gradients);
  // Makes what went wrong Python's current exception. The GIL is held.
  void (*raise)(void *error);
  void (*drop)(void *state);
  size_t inputs;
};

// What a node owns of Rust's.
struct State {
  const Operation *operation;
  const void *held;

  State(const Operation *operation, const void *held) : operation(operation), held(held) {}
  State(const State &) = delete;
  State &operator=(const State &) = delete;
  ~State() { operation->drop(const_cast<void *>(held)); }

  variable_list backward(const at::Tensor &gy, const variable_list &saved, const Needed &needed) const {
    std::array<const at::Tensor *, MOST> taken{};
    for (size_t i = 0; i < saved.size(); i++) {
      taken[i] = saved[i].defined() ? &saved[i] : nullptr;
    }
    std::array<at::Tensor *, MOST> given{};
    void *error = operation->backward(held, &gy, taken.data(), needed.data(), given.data());
    variable_list gradients(operation->inputs);
    for (size_t i = 0; i < gradients.size(); i++) {
      if (given[i] != nullptr) {
        gradients[i] = std::move(*given[i]);
        delete given[i];
      }
    }
    if (error != nullptr) {
      pybind11::gil_scoped_acquire gil;
      operation->raise(error);
      python_error raised;
      raised.persist();
      throw raised;
    }
    return gradients;
  }
};

// Compiled autograd takes numbers only: the states that it was told of, by number.
std::mutex known_mutex;
std::map<int64_t, std::weak_ptr<State>> known;

template <class N, class... A> auto new_node(A &&...arguments) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
  return c10::make_intrusive<N>(std::forward<A>(arguments)...);
#else
  return std::shared_ptr<N>(new N(std::forward<A>(arguments)...), torch::autograd::deleteNode);
#endif
}

// As torch's once_differentiable: the gradient of what is given is refused. By torch's own node: what Function::apply
// calls takes other arguments from torch 2.15 on, and the same build is to run there.
at::Tensor once(const at::Tensor &gradient) {
  const auto refused = new_node<torch::autograd::DelayedError>(
      "trying to differentiate twice a function that was marked with @once_differentiable", 1);
  return refused->apply(variable_list{gradient.detach().requires_grad_()})[0];
}

variable_list gradients(const State &state, const at::Tensor &gy, const variable_list &saved,
                        const Needed &needed) {
  const bool again = at::GradMode::is_enabled() && gy.requires_grad();
  variable_list found;
  {
    at::AutoGradMode no_grad(false);
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    found = state.backward(gy, saved, needed);
  }
  for (size_t i = 0; again && i < found.size(); i++) {
    if (found[i].defined()) {
      found[i] = once(found[i]);
    }
  }
  return found;
}

// The backward pass as compiled autograd calls it, from what the context holds.
struct Replayed : Function<Replayed> {
  static at::Tensor forward(AutogradContext *, const at::Tensor &y) { return y; }
  static variable_list backward(AutogradContext *ctx, const variable_list &given) {
    std::shared_ptr<State> state;
    {
      std::lock_guard<std::mutex> lock(known_mutex);
      const auto found = known.find(ctx->saved_data["state"].toInt());
      state = found == known.end() ? nullptr : found->second.lock();
    }
    TORCH_CHECK(state != nullptr, "the graph of this backward pass is gone");
    Needed needed{};
    for (size_t i = 0; i < state->operation->inputs; i++) {
      needed[i] = ctx->needs_input_grad(i);
    }
    return gradients(*state, given[0], ctx->get_saved_variables(), needed);
  }
};

struct LowRankLinearBackward final : CppNode<Replayed> {
  std::shared_ptr<State> state;
  std::atomic<int64_t> number{0};

  ~LowRankLinearBackward() override {
    if (number != 0) {
      std::lock_guard<std::mutex> lock(known_mutex);
      known.erase(number);
    }
  }

  std::string name() const override { return "LowRankLinearBackward"; }

  variable_list apply(variable_list &&given) override {
    std::lock_guard<std::mutex> lock(mutex_);
    at::OptionalDeviceGuard guard;
    const at::Tensor gy = given[0].defined() ? std::move(given[0]) : output_info_[0].zeros(guard);
    Needed needed{};
    for (size_t i = 0; i < num_outputs(); i++) {
      needed[i] = task_should_compute_output(i);
    }
    return gradients(*state, gy, ctx_.get_saved_variables(), needed);
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs &args) const override {
    auto self = const_cast<LowRankLinearBackward *>(this);
    {
      static int64_t last = 0;
      std::lock_guard<std::mutex> lock(known_mutex);
      if (self->number == 0) {
        self->number = ++last;
        known[last] = state;
      }
    }
    self->ctx_.saved_data["state"] = self->number.load();
    CppNode::compiled_args(args);
  }
};

// Set difference takes no backend away.
bool within(c10::DispatchKeySet keys, c10::DispatchKeySet bounds) {
  return (keys.raw_repr() & ~bounds.raw_repr()) == 0;
}

// Is nobody between a call and its kernel: no mode, no transform, no tracer, no autocast?
bool unwatched() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return within(keys.included_, c10::default_included_set) &&
         keys.excluded_.has_all(c10::default_excluded_set) && at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

// Float32 or bfloat16 in the memory of the CPU, with no further meaning: no subclass, view by a flag, dual number.
bool is_plain(PyObject *object) {
  constexpr c10::DispatchKeySet own({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                     c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  if (!THPVariable_CheckExact(object)) {
    return false;
  }
  const at::Tensor &tensor = THPVariable_Unpack(object);
  const auto dtype = tensor.scalar_type();
  return within(tensor.key_set(), own) && tensor.layout() == at::kStrided &&
         (dtype == at::kFloat || dtype == at::kBFloat16) && !tensor._fw_grad(0).defined();
}

} // namespace

extern "C" {

// Gives the tensors of `count` Python objects, borrowed, null for None; false where one is not for a direct call, or
// somebody else takes part in it. The GIL is held.
bool increlora_plain(PyObject *const *objects, size_t count, const at::Tensor **tensors) {
  if (!unwatched()) {
    return false;
  }
  for (size_t i = 0; i < count; i++) {
    if (objects[i] == Py_None) {
      tensors[i] = nullptr;
    } else if (is_plain(objects[i])) {
      tensors[i] = &THPVariable_Unpack(objects[i]);
    } else {
      return false;
    }
  }
  return true;
}

// Is autograd to know of what is done with it?
bool increlora_learns(const at::Tensor *tensor) { return tensor->requires_grad(); }

bool increlora_grad_mode() { return at::GradMode::is_enabled(); }

void increlora_below_autograd(void (*work)(void *), void *data) {
  at::AutoDispatchBelowADInplaceOrView guard;
  work(data);
}

// Makes `y`, fresh memory, the output of `operation` on the inputs; takes the state, also where it fails. False, with
// Python's exception set, where what is saved cannot be. The GIL is held.
bool increlora_record(at::Tensor *y, const at::Tensor *const *inputs, const at::Tensor *const *saved, size_t count,
                      const Operation *operation, const void *held) {
  HANDLE_TH_ERRORS
  auto state = std::make_shared<State>(operation, held);
  auto node = new_node<LowRankLinearBackward>();
  node->state = std::move(state);
  torch::autograd::edge_list edges;
  edges.reserve(operation->inputs);
  for (size_t i = 0; i < operation->inputs; i++) {
    edges.push_back(torch::autograd::impl::gradient_edge(*inputs[i]));
  }
  node->set_next_edges(std::move(edges));
  node->set_ctx_grad_fn(node);
  node->is_variable_input_.assign(operation->inputs, true);
  torch::autograd::set_history(*y, node);
  node->output_info_.emplace_back(*y);
  variable_list to_save;
  to_save.reserve(count);
  for (size_t i = 0; i < count; i++) {
    to_save.push_back(saved[i] == nullptr ? at::Tensor() : *saved[i]);
  }
  node->ctx_.save_for_backward(std::move(to_save));
  node->save_variables_to_ctx();
  return true;
  END_HANDLE_TH_ERRORS_RET(false)
}

} // extern "C"
