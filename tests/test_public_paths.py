"""Every public import path of release 0.1 works: user code, configurations and whole networks that were pickled."""

from __future__ import annotations

import importlib

import pytest

# module: the names that release 0.1 offered in it, by ``__all__`` or by the API reference
PATHS = {
    "lightning_lcnn": """
        AdversarialTraining CurvatureMonitor LCNNMixin LitClassifier PenaltyCallback PowerIteration evaluate
        fold lcnn_parameter_groups to_low_curvature
    """,
    "lightning_lcnn.bounds": """
        CurvatureGraph DirectionBounds LayerBound LayerRow MarginBounds NetworkBound Surrogate
        direction_bounds margin_bounds network_bound register_rule trace
    """,
    "lightning_lcnn.callbacks": "AdversarialTraining CurvatureMonitor PenaltyCallback PowerIteration",
    "lightning_lcnn.checkpoints": "LoadedClassifier import_class lit_classifier load_classifier network_file",
    "lightning_lcnn.classifier": "LitClassifier Normalize",
    "lightning_lcnn.cli": "main",
    "lightning_lcnn.conversion": "Change ConversionReport Kept fold to_low_curvature",
    "lightning_lcnn.data": """
        Digits ImageData ImageFolder TORCHVISION TorchvisionData class_names load_split shift_and_mirror
    """,
    "lightning_lcnn.evaluation": "evaluate",
    "lightning_lcnn.functional": """
        GradientNormResult GradientStabilityResult HessianNormResult HessianOperator LanczosResult
        NormalizedCurvatureResult ProbabilisticBoundResult SaliencyResult SingularTriplet
        SymmetricPowerResult batch_norm_slope centered_softplus clip_factor compiled_softplus_in_use
        conv_norm_bound cosine_agreement filtered_power_iteration gradient_stability input_gradient_norm
        input_hessian_norm input_hessian_norm_probabilistic_bound lanczos lanczos_probabilistic_gap
        largest_singular_triplet lipschitz_radius log_mean_exp_pool2d log_normalized_curvature_bound
        logit_margin matrix_norm_bound normalized_curvature operator_norm_bound operator_norm_estimate
        per_example_loss power_iteration projected_gradient_attack recompute_activations reference_penalty
        register_linear_layer saliency_under_noise second_order_dual_radius sum_log_penalty
        symmetric_power_iteration target_logit taylor_radius top_k_agreement use_compiled_softplus
    """,
    "lightning_lcnn.layers": """
        CenteredSoftplus LearnableBeta LipschitzBatchNorm1d LipschitzBatchNorm2d LipschitzBatchNorm3d
        LogMeanExpPool2d PiecewiseSoftplus ScaledActivation SmoothELU SmoothHardswish SmoothPReLU
        SpectralConv1d SpectralConv2d SpectralConv3d SpectralLayer SpectralLinear lcnn_parameter_groups
        log_betas log_gammas low_curvature_parameters reset_spectral_norm spectral_layers update_bn
        update_spectral_norm
    """,
    "lightning_lcnn.metrics": """
        AdversarialAccuracy CertifiedAccuracy GradientStability InputGradientNorm InputHessianNorm
        MeasuringMetric NormalizedCurvature
    """,
    "lightning_lcnn.mixin": "LCNNMixin",
    "lightning_lcnn.models": "Normalize ResNet VGG resnet18 resnet34 vgg11",
    "lightning_lcnn.networks": """
        LIBRARIES OWN build_network is_low_curvature known_names load_weights unknown_name
    """,
    "lightning_lcnn.penalties": """
        CurePenalty CurvaturePenalty GradientNormPenalty GraphCache MODES Penalty Schedule network_of
    """,
    "lightning_lcnn.plots": """
        accuracy_against_curvature adversarial_curves curvature_histograms gradient_grid layer_bars
        stability_curves training_curves values_over_layers
    """,
    "lightning_lcnn.report": "write_report",
}
# classes by whose paths a pickle finds them: ``torch.save(network)``, metrics in a saved callback
PICKLED = """
    classifier.LitClassifier classifier.Normalize layers.activation.LearnableBeta layers.activation.CenteredSoftplus
    layers.batch_norm.LipschitzBatchNorm1d layers.batch_norm.LipschitzBatchNorm2d
    layers.batch_norm.LipschitzBatchNorm3d layers.piecewise.PiecewiseSoftplus layers.pooling.LogMeanExpPool2d
    layers.smooth.ScaledActivation layers.smooth.SmoothPReLU layers.smooth.SmoothELU layers.smooth.SmoothHardswish
    layers.spectral.SpectralLinear layers.spectral.SpectralConv1d layers.spectral.SpectralConv2d
    layers.spectral.SpectralConv3d metrics.adversarial.AdversarialAccuracy metrics.base.MeasuringMetric
    metrics.certified.CertifiedAccuracy metrics.curvature.InputGradientNorm metrics.curvature.InputHessianNorm
    metrics.curvature.NormalizedCurvature metrics.curvature.GradientStability metrics.per_example.PerExampleMetric
    models.normalize.Normalize models.resnet.BasicBlock models.resnet.ResNet models.vgg.VGG
"""


@pytest.mark.parametrize(("module", "names"), PATHS.items(), ids=list(PATHS))
def test_public_names_of_0_1(module: str, names: str) -> None:
    found = importlib.import_module(module)
    for name in names.split():
        assert hasattr(found, name), f"{module}.{name} was public in 0.1"


@pytest.mark.parametrize("path", PICKLED.split())
def test_pickles_of_0_1_find_their_classes(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert isinstance(getattr(importlib.import_module(f"lightning_lcnn.{module}"), name), type)


def test_old_paths_lead_to_the_same_objects() -> None:
    from lightning_lcnn import classifier, models, networks
    from lightning_lcnn.models import by_name

    assert networks.build_network is by_name.build_network
    assert classifier.Normalize is models.Normalize
