"""Pure functions on tensors and operators: every formula of the package, once."""

from lightning_lcnn.functional.certificates import lipschitz_radius, second_order_dual_radius, taylor_radius
from lightning_lcnn.functional.conv_norm import conv_norm_bound, matrix_norm_bound
from lightning_lcnn.functional.hessian_operator import HessianOperator
from lightning_lcnn.functional.input_derivatives import (
    GradientNormResult,
    HessianNormResult,
    NormalizedCurvatureResult,
    input_gradient_norm,
    input_hessian_norm,
    normalized_curvature,
)
from lightning_lcnn.functional.lanczos import LanczosResult, SymmetricPowerResult, lanczos, symmetric_power_iteration
from lightning_lcnn.functional.operator_norm import operator_norm_bound, operator_norm_estimate, register_linear_layer
from lightning_lcnn.functional.outputs import logit_margin, per_example_loss, target_logit
from lightning_lcnn.functional.penalty_formulas import (
    log_normalized_curvature_bound,
    reference_penalty,
    sum_log_penalty,
)
from lightning_lcnn.functional.probabilistic import (
    ProbabilisticBoundResult,
    input_hessian_norm_probabilistic_bound,
    lanczos_probabilistic_gap,
)
from lightning_lcnn.functional.projected_gradient import projected_gradient_attack
from lightning_lcnn.functional.singular_vectors import (
    SingularTriplet,
    filtered_power_iteration,
    largest_singular_triplet,
    power_iteration,
)
from lightning_lcnn.functional.smooth_pooling import log_mean_exp_pool2d
from lightning_lcnn.functional.softplus import centered_softplus
from lightning_lcnn.functional.stability import (
    GradientStabilityResult,
    SaliencyResult,
    cosine_agreement,
    gradient_stability,
    saliency_under_noise,
    top_k_agreement,
)
from lightning_lcnn.kernels.clipped_batch_norm import batch_norm_slope, clip_factor
from lightning_lcnn.kernels.compiled_softplus import compiled_softplus_in_use, use_compiled_softplus
from lightning_lcnn.kernels.recomputation import recompute_activations

__all__ = [
    "GradientNormResult",
    "GradientStabilityResult",
    "HessianNormResult",
    "HessianOperator",
    "LanczosResult",
    "NormalizedCurvatureResult",
    "ProbabilisticBoundResult",
    "SaliencyResult",
    "SingularTriplet",
    "SymmetricPowerResult",
    "batch_norm_slope",
    "centered_softplus",
    "clip_factor",
    "compiled_softplus_in_use",
    "conv_norm_bound",
    "cosine_agreement",
    "filtered_power_iteration",
    "gradient_stability",
    "input_gradient_norm",
    "input_hessian_norm",
    "input_hessian_norm_probabilistic_bound",
    "lanczos",
    "lanczos_probabilistic_gap",
    "largest_singular_triplet",
    "lipschitz_radius",
    "log_mean_exp_pool2d",
    "log_normalized_curvature_bound",
    "logit_margin",
    "matrix_norm_bound",
    "normalized_curvature",
    "operator_norm_bound",
    "operator_norm_estimate",
    "per_example_loss",
    "power_iteration",
    "projected_gradient_attack",
    "recompute_activations",
    "reference_penalty",
    "register_linear_layer",
    "saliency_under_noise",
    "second_order_dual_radius",
    "sum_log_penalty",
    "symmetric_power_iteration",
    "target_logit",
    "taylor_radius",
    "top_k_agreement",
    "use_compiled_softplus",
]
