"""The arithmetic of IncreLoRA on torch tensors, in Rust.

Every function checks its arguments and raises ValueError (shapes, devices, values) or TypeError
(dtypes) with the name of the argument; RuntimeError where libtorch refuses. None records an autograd
graph. Tensors may lie on the CPU or on a CUDA device.
"""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = [
    "BUILT_FOR",
    "DIRECT",
    "RESERVE_E",
    "Fluctuation",
    "Newborns",
    "Schedule",
    "StepPlan",
    "TripletSchedule",
    "TripletScores",
    "adapter_backward",
    "adapter_forward",
    "add_energy_",
    "add_l1_",
    "add_orthogonality_gradient_",
    "add_to_sketch_",
    "average_energy_",
    "block_diagonal_backward",
    "block_diagonal_forward",
    "choose_moves",
    "cuda_add_grad_x",
    "cuda_add_orthogonality_gradient_",
    "cuda_apply_mask",
    "cuda_compile",
    "cuda_cubin",
    "cuda_down",
    "cuda_draw_mask",
    "cuda_emulate",
    "cuda_factors",
    "cuda_gradients",
    "cuda_importance_",
    "cuda_kernels",
    "cuda_prepare",
    "cuda_smooth_",
    "cuda_unavailable",
    "direct_linear",
    "dropout_mask",
    "importance",
    "importance_window",
    "linear_forward",
    "live_triplets",
    "orthogonality",
    "prune_",
    "restart_",
    "shrink_gates_",
    "sketch_scores",
    "sketched_triples",
    "smooth_",
    "square_backward",
    "square_forward",
    "take_sketches_",
]

RESERVE_E: float
"""E of the components in reserve, 1e-5."""

BUILT_FOR: str
"""The mark in the extension's file that names the torch it was built for."""

DIRECT: bool
"""Are linear layers called by a node of autograd's in C++? Only under the minor torch built for."""

def adapter_forward(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    scale: float,
    p: float = 0.0,
    seed: int = 0,
    stream: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Adds ``scale * B (E * (A drop(x)))`` to ``y`` in place (arXiv 2308.12043, eq. 3).

    Args:
        y: (tokens, out), overwritten.
        x: (tokens, in); its dtype is the one of the matrix products.
        a: (rows, in). b: (out, rows). e: (active, 1), active <= rows; rows past it count with
            ``RESERVE_E``. The three have one dtype.
        p: Dropout probability, 0 to 1. seed: of its mask, which depends on nothing else; where a CUDA
            device cannot load the kernels, torch's generator draws the mask.
        stream: Handle of torch's current CUDA stream, here and in all that follows; 0 on the CPU.

    Returns:
        ``A drop(x)``, (tokens, rows), in the dtype of x or float32, and the mask (uint8) where it has
        to be kept, that is, on another device than the CPU: both for :func:`adapter_backward`.
    """

def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    scale: float,
    p: float = 0.0,
    seed: int = 0,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``x W^T + bias`` and the update of :func:`adapter_forward`, in one call.

    Args:
        weight: (out, in), bias: (out), both of the dtype of x (..., in).

    Returns:
        y (..., out), and the two of :func:`adapter_forward`.
    """

def direct_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    e: Tensor | None,
    with_reserve: bool,
    scale: float,
    p: float,
    probe: Any,
    slot: int,
) -> Tensor | None:
    """:func:`linear_forward` as a part of autograd's graph, with the seed drawn from torch's generator; its
    backward pass runs no Python but what the probe asks for.

    Only for plain tensors, float32 or bfloat16 on the CPU, of shapes and dtypes that fit, weight and bias
    without a gradient; and where no mode, transform, tracer or autocast takes part.

    Args:
        with_reserve: May there be more rows of A than of E?
        probe: The :class:`increlora_rs.ops.probe.Probe` that counts backward passes, or None.
        slot: The module's, in the probe's gauge.

    Returns:
        y (..., out); None, with nothing done, for everything else.
    """

def block_diagonal_forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    y: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: int = 0,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``y_i += scale * B_i (A_i drop(x)_i)`` for n equal slices of x and y (arXiv 2402.17263).

    Args:
        x: (tokens, in) with ``y``, (..., in) with ``weight``; its dtype is the one of the matrix products.
        a: (n, r, in / n). b: (n, out / n, r). Of one dtype.
        y: (tokens, out), contiguous, overwritten; or
        weight: (out, in), bias: (out), both of the dtype of x: y is then what the layer gives.
        p, seed: As in :func:`adapter_forward`.

    Returns:
        y, ``A_i drop(x)_i`` (n, tokens, r) in the dtype of x, and the mask where it has to be kept.
    """

def block_diagonal_backward(
    gy: Tensor,
    x: Tensor,
    t: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    p: float = 0.0,
    seed: int = 0,
    needs_x: bool = True,
    weight: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients for x (None unless ``needs_x``), A and B from ``gy`` (tokens, out), with x (tokens, in) and
    the t of :func:`block_diagonal_forward`. With ``weight`` (out, in) the gradient for x is the whole
    layer's."""

def square_forward(
    x: Tensor,
    m: Tensor,
    form: int,
    scale: float,
    *,
    out: int,
    angles: tuple[Tensor, Tensor] | None = None,
    fold: bool = True,
    y: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: int = 0,
    stream: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``y += scale * decomp(M comp(drop(x)))`` (arXiv 2405.12130).

    Args:
        x, y, weight, bias, p, seed: As in :func:`block_diagonal_forward`.
        m: M, (q, q).
        form: The type, 1, 2, 3, 4 or 6; see :mod:`increlora_rs.ops.square`.
        out: Features of y.
        angles: Of type 6, cosines and sines of every block of inputs, (blocks, q / 2), of the dtype of M.
        fold: Of type 6: do blocks of inputs beyond the outputs' go to the first ones again?

    Returns:
        y, ``comp(drop(x))`` (tokens, q) without the dropout's gain (None for type 6), and the mask where it
        has to be kept.
    """

def square_backward(
    gy: Tensor,
    x: Tensor | None,
    kept: Tensor | None,
    m: Tensor,
    form: int,
    scale: float,
    *,
    features: int,
    angles: tuple[Tensor, Tensor] | None = None,
    fold: bool = True,
    mask: Tensor | None = None,
    p: float = 0.0,
    seed: int = 0,
    needs: tuple[bool, bool] = ...,
    weight: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients for x and M from ``gy`` (tokens, out).

    Args:
        x: (tokens, in), for type 6. kept: What :func:`square_forward` gave, for the others.
        features: in.
        needs: Are those for M and for x wanted?
        weight: (out, in): the gradient for x is the whole linear layer's.
    """

def dropout_mask(elements: int, p: float, seed: int, offset: int = 0) -> Tensor:
    """The CPU's dropout mask of a tensor of so many elements: uint8 of ceil(elements / 8), bit i set
    where element i is kept. ``offset`` is the first counter of the Philox4x32-10 generator."""

def adapter_backward(
    gy: Tensor,
    x: Tensor,
    t: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    scale: float,
    mask: Tensor | None = None,
    p: float = 0.0,
    needs_x: bool = True,
    importance: Tensor | None = None,
    slot: int = 0,
    seed: int = 0,
    weight: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients for x (None unless ``needs_x``), A, B, E from ``gy`` (tokens, out).

    On the CPU the mask is drawn again from ``seed`` unless it is given. With ``weight`` (out, in) the
    gradient for x is the whole linear layer's.

    ``importance`` is a float64 vector; ``sum |dW * G|`` of this call is added to its slot ``slot``.
    """

def importance(
    gy: Tensor, x: Tensor, a: Tensor, b: Tensor, e: Tensor, scale: float, stream: int = 0
) -> Tensor:
    """``sum_ij |dW_ij G_ij|`` with ``dW = scale B diag(E) A`` and ``G = gy^T x`` (eq. 6), not yet
    divided by the module's size; a float64 scalar. Neither matrix is built as a whole."""

def smooth_(
    importance: Tensor,
    factor: Tensor,
    mean: Tensor,
    uncertainty: Tensor,
    beta1: float,
    beta2: float,
    stream: int = 0,
) -> None:
    """One step of the smoothing (eq. 7 and 8) of ``importance * factor``, in place in ``mean`` and
    ``uncertainty``. All four are float64 vectors, a slot a module. A step with a value that is not
    finite changes nothing."""

def orthogonality(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Mean over all A (rows, in) and B (out, rows) of ``||A A^T - I||_F`` and ``||B^T B - I||_F``
    (eq. 4); a float64 scalar."""

def add_orthogonality_gradient_(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    grad_a: Sequence[Tensor],
    grad_b: Sequence[Tensor],
    factor: Tensor,
) -> Tensor:
    """Adds ``factor`` (a scalar tensor) times the gradient of :func:`orthogonality` to ``grad_a`` and
    ``grad_b`` in place; returns the value."""

def add_to_sketch_(
    left: Tensor,
    right: Tensor,
    omega: Tensor,
    psi: Tensor,
    gy: Tensor,
    x: Tensor,
    taken: tuple[Tensor, Tensor] | None = None,
) -> bool:
    """Adds the gradient ``G = gy^T x`` (out, in), which is not formed, to a sketch of it, in place.

    Args:
        left: ``(G Omega)^T``, (k, out). right: ``Psi G``, (l, in).
        omega: Omega^T, (k, in). psi: Psi, (l, out). All four have one dtype.
        gy: (tokens, out). x: (tokens, in). Of any floating dtypes; the products are of the sketch's.
        taken: Sums that left and right are added to before; G comes in their place.

    Returns:
        Are left and right finite? On a GPU nobody looks, and it is True.
    """

def take_sketches_(
    step: Tensor,
    sum: Tensor,
    steps: Tensor,
    *,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """``sum += step / scale`` and ``steps += 1``, in place, unless a number of ``step`` is not finite or
    ``found_inf`` is above 0; ``step`` becomes 0.

    Args:
        step, sum: Vectors of one dtype and length: sketches of one optimizer step, and of several.
        steps: float64, one number.
        scale: What the loss was multiplied by, one number. found_inf: One number.
    """

def sketch_scores(
    sketches: Sequence[tuple[Tensor, Tensor]],
    psis: Sequence[Tensor],
    factors: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """The first singular value of :func:`sketched_triples` for many modules at once, float64 (modules), on
    the CPU.

    Args:
        sketches: left and right of each module. psis: Its psi. factors: Its a and b.

    Raises:
        ValueError: the lists are not of one length.
    """

def sketched_triples(
    left: Tensor, right: Tensor, psi: Tensor, a: Tensor, b: Tensor, count: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` leading singular triples of the part of a sketched G (out, in) that is outside the span
    of the rows of ``a`` (rows, in) and of the columns of ``b`` (out, rows'), ``(1 - P_B) G (1 - P_A)``.

    Returns:
        Singular values (count), left vectors (out, count), right vectors (count, in); float64 on the CPU.
        Exact for a G of at most the sketch's rank k; 0 for triples that are not there, NaN where a number
        that goes in is not finite. Signed so that the first of the largest entries of a right vector is
        positive.
    """

@final
class Schedule:
    """When and how much the ranks grow, for ``total_steps`` optimizer steps.

    Args:
        total_steps: 1 or more.
        ranks: First rank of each module, uint64. caps: The largest each may have, uint64.
        budget: Total rank to reach, or what all components may cost.
        tinit, deltaT, top_h: None leaves them to the library: warm-up 10 % of the steps, at most half of
            ``growth_end``, at most 50 events, at least 10 steps apart (closer where none would lie before the
            end, as in trainings of fewer than 100 steps), spread until ``growth_end``, and as many modules
            an event as the budget needs.
        add_r: What each module gains at least; raised where ``top_h`` is None and all modules together
            would not reach the budget.
        growth_end: Share of the steps, above 0 and at most 1, by which the budget is reached. From a
            ``tinit`` at or after it on, growth takes as many steps as it would have taken. A ``deltaT`` of
            which no multiple lies before it, or a ``top_h`` too low for it, has growth end at ``last``.
        costs: What a component of each module takes of the budget, 1 or more, uint64; None: 1, the budget
            is a total rank.
    """

    def __new__(
        cls,
        total_steps: int,
        ranks: npt.NDArray[np.uint64],
        caps: npt.NDArray[np.uint64],
        budget: int,
        *,
        tinit: int | None = None,
        deltaT: int | None = None,
        top_h: int | None = None,
        add_r: int = 1,
        growth_end: float = 0.1,
        costs: npt.NDArray[np.uint64] | None = None,
    ) -> Schedule: ...
    @property
    def tinit(self) -> int:
        """Steps before the first growth."""
    @property
    def deltaT(self) -> int:
        """Steps between events; an event happens where the step is a multiple of it."""
    @property
    def top_h(self) -> int:
        """Modules that grow at an event."""
    @property
    def add_r(self) -> int:
        """Components that each gains."""
    @property
    def end(self) -> int:
        """The step that ``growth_end`` means."""
    @property
    def last(self) -> int:
        """The step of the last growth, at the latest; 0 where there is none."""
    @property
    def reached(self) -> int:
        """Part of the budget that is spent by the last step whatever modules are chosen; all of it means
        until no component fits any more."""
    @property
    def possible(self) -> int:
        """Part of the budget that no choice of modules passes by the last step."""
    def is_event(self, step: int) -> bool:
        """Do ranks grow after ``step`` (the first is 1)?"""
    def next_event(self, step: int) -> int:
        """The first event at or after ``step``."""
    def choose(
        self,
        scores: npt.NDArray[np.float64],
        ranks: npt.NDArray[np.uint64],
        caps: npt.NDArray[np.uint64],
        budget: int,
    ) -> list[tuple[int, int]]:
        """(module, components) of those that grow: the ``top_h`` of highest score for their cost with room,
        never past a cap nor past ``budget``. Of those within 1e-5 of the best that is left, relative, the
        first in model order is next. Where the budget does not pay for all of them, what is left goes to
        those that it pays for."""

def shrink_gates_(gates: Sequence[Tensor], xi: float, *, official: bool) -> None:
    """Moves every gate v by ``xi`` towards 0, in place and in its own dtype: the proximal step of SoRA
    (arXiv 2311.11696). What is 0 is never -0; NaN stays NaN.

    Args:
        gates: Of all modules, any shapes, each once.
        xi: 0 or more, rounded to the gates' dtype.
        official: False: ``sign(v) max(|v| - xi, 0)``. True: as SoRA's code does it, ``v > xi`` less xi,
            ``v < -xi`` plus xi, then every ``|v| < xi`` to 0; so all below 2 xi become 0, xi itself excepted.
    """

def add_l1_(
    gates: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    weight: float,
    *,
    grad_scale: Tensor | None = None,
) -> None:
    """Adds the gradient of ``weight * sum |g| / (number of gates of all modules)`` to ``gradients``, in
    place: SoRA's L1 term (arXiv 2311.11696). That of ``|g|`` at 0 is 0.

    Args:
        gates, gradients: One of each a module, of one shape; the gates of a module without a gradient count
            in the number all the same.
        grad_scale: What the gradients are multiplied by, one number; read on its device.
    """

def add_energy_(total: Tensor, gy: Tensor, x: Tensor) -> None:
    """Adds what went into a module in one backward pass: for each feature the sum of its squares over the
    tokens whose row of ``gy`` is not 0 as a whole, and the number of these.

    Args:
        total: (in + 1), float64, the number at the end.
        gy: (tokens, out).
        x: (tokens, in), before dropout.
    """

def average_energy_(norms: Tensor, total: Tensor, features: Sequence[int], beta: float) -> None:
    """Takes a step's ``total`` into the running norms, ``v <- beta v + (1 - beta) n`` with n the root mean
    square of a feature, in place; ``total`` becomes 0. A v whose n is not finite, as of a module that no
    token was counted for, stays as it is.

    Args:
        norms: v of all modules, one after the other, float64.
        total: What :func:`add_energy_` added up of all, likewise.
        features: Input features of each module.
        beta: In [0, 1).
    """

def prune_(a: Sequence[Tensor], norms: Tensor, share: float, *, by_row: bool) -> None:
    """Sets the ``floor(share n)`` entries of A with the smallest ``|A_ij| v_j`` of every row of n, or of n
    entries in all, to 0, in place: PRILoRA's pruning (arXiv 2401.11316). Of equal ones the first go.

    Args:
        a: (rank, in) of each module.
        norms: As for :func:`average_energy_`.
        share: From 0 to 1.
        by_row: Row by row, or else the whole matrix.
    """

def live_triplets(scores: npt.NDArray[np.float64], budget: int) -> npt.NDArray[np.bool_]:
    """Which triplets are live: the ``budget`` of highest score; of equals the first, so that never more are
    masked than have to be."""

def importance_window(beta1: float, beta2: float) -> int:
    """The smallest n with ``max(beta1, beta2)**n < 1e-3``."""

def restart_(
    parameters: Sequence[tuple[Tensor, Tensor, Sequence[int], int]],
    step: int,
    *,
    multiplier: float | None = None,
    lr_warmup: int = 0,
    linear_until: int | None = None,
    betas: tuple[float, float] | None = None,
    adam_lead: int = 0,
    decay: float = 0.0,
    stream: int = 0,
) -> None:
    """Gives newborn rows their own learning rate after an optimizer step, in place (section 3.3).

    Args:
        parameters: (parameter, its value before the step, the step at which each row was born, the
            dimension of the rows).
        step: The step just taken.
        multiplier: Learning rate over initial learning rate of that step; None: no restart warm-up.
        lr_warmup: Steps of the linear warm-up. linear_until: Step at which a linear decay ends; None
            for every other schedule.
        betas: Adam's, for its bias correction; None for other optimizers. adam_lead: Steps that the
            optimizer had taken before the first counted one.
        decay: Decoupled weight decay of the step: learning rate times weight decay.
        stream: Handle of torch's current stream on the device of the parameters; 0 on the CPU.
    """

@final
class StepPlan:
    """What the scheduler does between the backward pass and the optimizer's update, for all modules
    in one call. It holds the tensors, which may change their size in place (``Tensor.set_``).

    Args:
        a, b: Leaves, (rows, in) and (out, rows), one of each a module.
        importance, norm, mean, uncertainty: float64 vectors, a slot a module: of :func:`smooth_`, with
            ``norm`` its ``factor`` but for the loss scale. beta1, beta2: its decays.
    """

    def __new__(
        cls,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        importance: Tensor,
        norm: Tensor,
        mean: Tensor,
        uncertainty: Tensor,
        beta1: float,
        beta2: float,
    ) -> StepPlan: ...
    def take_gradients_(
        self,
        *,
        smooth: bool,
        weight: float,
        loss_scale: float | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        stream: int = 0,
    ) -> None:
        """Smooths the importances and sets them to 0, where ``smooth``; adds ``weight`` times the
        gradient of :func:`orthogonality` over all modules to ``grad`` of the leaves of those modules
        whose two leaves have one.

        Args:
            loss_scale: What the loss, and with it the importance, was multiplied by.
            grad_scale: The same, one number, where the gradients carry it still: it takes the place of
                ``loss_scale``, and the regulariser is multiplied by it.
            found_inf: One number, above 0 where gradients overflowed: nothing is smoothed then.
        """
    def orthogonality(self) -> Tensor:
        """:func:`orthogonality` of all modules."""

@final
class Fluctuation:
    """E of all modules, observed in every step in one call. It holds the tensors, which may change their size
    in place (``Tensor.set_``).

    Args:
        values: Leaves, E (rank, 1), one a module.
    """

    def __new__(cls, values: Sequence[Tensor]) -> Fluctuation: ...
    def observe_(
        self,
        mean: Tensor,
        squares: Tensor,
        steps: Tensor,
        *,
        mean_rate: float,
        square_rate: float,
    ) -> None:
        """Takes the first-order effects ``p = E dL/dE`` of one optimizer step in, in place::

            p       <- p / sqrt(mean p^2 over all components)
            weight  <- max(1 / (steps + 1), mean_rate)
            share   <- max(1 / max(steps, 1), square_rate)
            squares <- squares + share ((1 - weight) (p - mean)^2 - squares)
            mean    <- mean + weight (p - mean)
            steps   <- steps + 1

        A leaf without a gradient has one of 0. A factor that all gradients carry does not count. A step in
        which any p is not finite changes nothing.

        Args:
            mean, squares, steps: float64 (components of all modules), in the order of ``values``.
            mean_rate, square_rate: In (0, 1].
        """

@final
class TripletSchedule:
    """When AdaLoRA masks triplets, and how many stay live (arXiv 2303.10512). Steps count from 1; the t of
    the paper's code is the step less 1.

    Args:
        total_steps: Of the training. first: All triplets. target: Those that are live at the end.
        tinit: Steps before the first mask event; None: 15 %, at most half of those before ``tfinal``.
        tfinal: Steps at the end in which what is masked stays so; None: half of those after ``tinit``.
        deltaT: Steps between mask events; None: as makes some 200 of them, at least 1.

    Raises:
        ValueError: ``target`` is above ``first``, or no step is left for the ranks to fall in.
    """

    def __new__(
        cls,
        total_steps: int,
        first: int,
        target: int,
        *,
        tinit: int | None = None,
        tfinal: int | None = None,
        deltaT: int | None = None,
    ) -> TripletSchedule: ...
    @property
    def total_steps(self) -> int:
        """Steps of the training."""
    @property
    def first(self) -> int:
        """All triplets."""
    @property
    def target(self) -> int:
        """Those that are live at the end."""
    @property
    def tinit(self) -> int:
        """Steps before the first mask event."""
    @property
    def tfinal(self) -> int:
        """Steps at the end in which what is masked stays so."""
    @property
    def deltaT(self) -> int:
        """Steps between mask events; an event is where t is a multiple of it."""
    @property
    def last(self) -> int:
        """The step of the last mask event: t is ``total_steps - tfinal``, or it is the last step."""
    def budget(self, step: int) -> int:
        """How many may be live after ``step``: all until ``tinit``, then, rounded down, ``target + (first -
        target) (1 - (t - tinit) / (total_steps - tfinal - tinit))^3``, and the target from ``last`` on."""
    def is_event(self, step: int) -> bool:
        """Are triplets chosen anew after ``step``?"""
    def observes(self, step: int) -> bool:
        """Does a mask event need the gradients of ``step``?"""
    def holds(self, step: int) -> bool:
        """Is what was chosen last masked again after ``step``?"""

@final
class TripletScores:
    """How sensitive the loss is to each number of AdaLoRA's triplets, smoothed, for all modules in one call.

    Args:
        a, b, e: Leaves, (rank, in), (out, rank) and (rank, 1), one of each a module.
        mean, uncertainty: Vectors of one dtype, float32 or float64, with a slot for each of their numbers:
            module by module, A, B and E after each other, row by row. They change in place.
        beta1, beta2: Decays, in [0, 1).
    """

    def __new__(
        cls,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        e: Sequence[Tensor],
        mean: Tensor,
        uncertainty: Tensor,
        beta1: float,
        beta2: float,
    ) -> TripletScores: ...
    def observe_(self) -> None:
        """Takes the gradients of the leaves in, and their values as they are. With ``I = |p dL/dp|``::

            mean        <- beta1 mean + (1 - beta1) I
            uncertainty <- beta2 uncertainty + (1 - beta2) |I - mean|      (the new mean)

        A leaf without a gradient counts as one of gradient 0; a number whose I is not finite keeps what it
        has."""
    def values(self) -> Tensor:
        """The score of every triplet i, module by module, float64: ``s(E_i) + mean_j s(A_ij) + mean_j
        s(B_ji)`` with ``s = mean * uncertainty``."""

@final
class Newborns:
    """Parameters with rows that were born during training, for :func:`restart_` at every step: keeps
    itself what those rows were. It holds the parameters, which keep their size.

    Args:
        parameters: (parameter, the step at which each row was born, the dimension of the rows).
    """

    def __new__(cls, parameters: Sequence[tuple[Tensor, Sequence[int], int]]) -> Newborns: ...
    def keep(self, stream: int = 0) -> None:
        """Before the optimizer's step: keeps the newborn rows, all that stand after the first."""
    def correct(
        self,
        step: int,
        *,
        multiplier: float | None = None,
        lr_warmup: int = 0,
        linear_until: int | None = None,
        betas: tuple[float, float] | None = None,
        adam_lead: int = 0,
        decay: float = 0.0,
        stream: int = 0,
    ) -> None:
        """After it: :func:`restart_` of the same arguments."""

def cuda_compile(architecture: str) -> str:
    """Compiles the CUDA kernels for ``architecture`` ("sm_90"), which needs no GPU; returns the
    compiler's log. RuntimeError where that fails."""

def cuda_cubin(architecture: str) -> bytes:
    """The device code for ``architecture``, as a device would load it: from the cache folder, else
    compiled and kept there."""

def cuda_kernels() -> list[str]:
    """The names of all kernels."""

def cuda_prepare(index: int) -> str | None:
    """Loads the kernels of CUDA device ``index``; returns the reason where they cannot be had."""

def cuda_unavailable() -> str | None:
    """Why kernels were asked for and could not be had, for the first device where that happened."""

def cuda_emulate(launch: int) -> None:
    """For tests: sends the kernels for CPU tensors to the C function at this address (0: to none).
    Any other number crashes the process."""

def cuda_draw_mask(x: Tensor, p: float, seed: int, offset: int = 0, stream: int = 0) -> Tensor | None:
    """Packed dropout mask of all elements of ``x``, uint8; bit for bit the CPU's.

    This and the following take float32, float16 and bfloat16, and return None or False, with nothing
    done, where no kernel can be used.
    """

def cuda_apply_mask(x: Tensor, mask: Tensor, stream: int = 0) -> Tensor | None:
    """``x`` where the packed ``mask`` is set, else 0."""

def cuda_down(
    x: Tensor, a: Tensor, gain: float, p: float, seed: int, offset: int = 0, stream: int = 0
) -> tuple[Tensor, Tensor] | None:
    """``gain * drop(x) a^T`` (tokens, ranks) of ``x`` (tokens, in) and ``a`` (ranks, in), one dtype, and the
    packed mask."""

def cuda_add_grad_x(
    gx: Tensor, accumulate: bool, u: Tensor, a: Tensor, mask: Tensor | None, gain: float, stream: int = 0
) -> bool:
    """``gx (+)= gain * drop(u a)`` in place; gx (tokens, in), u (tokens, ranks), a (ranks, in), one dtype."""

def cuda_factors(
    a: Tensor, b: Tensor, e: Tensor, scale: float, like: Tensor, stream: int = 0
) -> tuple[Tensor, Tensor] | None:
    """A (ranks, in) and ``scale b diag(e)`` (out, ranks) in the dtype of ``like``; e (active, 1), the others
    count with ``RESERVE_E``. The dtype of the three is float32, or that of ``like``."""

def cuda_gradients(
    a: Tensor, b: Tensor, e: Tensor, scale: float, right: Tensor, left: Tensor, gain: float, stream: int = 0
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradients of a, b and e, as they are given to :func:`cuda_factors`, from those of the products:
    ``gain * right`` (ranks, in) that of a, ``left`` (ranks, out) that of ``(scale b diag(e))^T``."""

def cuda_importance_(
    vector: Tensor, slot: int, p: Tensor, a: Tensor, gy: Tensor, x: Tensor, gain: float, stream: int = 0
) -> bool:
    """``vector[slot] += gain * sum |(p a) * (gy^T x)|``; vector float64, p (out, ranks), a (ranks, in)."""

def cuda_smooth_(
    importance: Tensor,
    factor: Tensor,
    mean: Tensor,
    uncertainty: Tensor,
    beta1: float,
    beta2: float,
    stream: int = 0,
) -> bool:
    """:func:`smooth_` in one launch."""

def cuda_add_orthogonality_gradient_(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    grad_a: Sequence[Tensor],
    grad_b: Sequence[Tensor],
    factor: Tensor,
    stream: int = 0,
) -> Tensor | None:
    """:func:`add_orthogonality_gradient_` in three launches for up to 256 modules of up to 64 ranks."""

def choose_moves(
    values: npt.NDArray[np.float64],
    judged: npt.NDArray[np.bool_],
    grown: npt.NDArray[np.bool_],
    ranks: npt.NDArray[np.uint64],
    caps: npt.NDArray[np.uint64],
    costs: npt.NDArray[np.uint64],
    *,
    budget: int,
    most: int,
    margin: float,
) -> tuple[list[int], list[int]]:
    """The components that leave, as positions among those of all modules, and how many each module gains.

    All is weighed by value for cost. The least leave first; the next component of a module is expected to
    be worth the lower quartile of its grown ones, divided by one more than it gains; it is given as long as
    that is ``margin`` times what each is worth that has to leave for it. No module gives and gains.

    Args:
        values, judged, grown: (components of all modules): what each is worth, finite and at least 0; may it
            leave; does it speak for its module? Where none does, those that may leave do.
        ranks, caps, costs: (modules): components that each has, the most it may have, what one takes.
        budget: What all may take afterwards.
        most: What may be given, beside what has to leave for the budget.
        margin: 1 or more.
    """
