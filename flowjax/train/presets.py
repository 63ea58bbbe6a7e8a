"""What a paper chose: path, prediction, law of t, weight, solver, by name.

A preset is data: the keys of `config.flow` and `config.sample` in which it
differs from the defaults, which are rectified flow with logit-normal times.
`apply` sets them in any config, so that the same network learns by the
mathematics of any of these papers. `docs/flow.md` has the table.
"""

from typing import Any

import ml_collections

from flowjax import schema
from flowjax.train import experiment

PRESETS: dict[str, dict[str, Any]] = {
  # Rectified flow (arXiv:2209.03003): straight, uniform, Euler.
  "rectified_flow": {
    "flow.law.name": "uniform",
    "sample.solver.name": "euler",
    "sample.steps": 50,
  },
  # Flow matching (arXiv:2210.02747): the optimal-transport conditional path.
  "cfm": {
    "flow.path.sigma_min": 1e-4,
    "flow.law.name": "uniform",
    "sample.solver.name": "midpoint",
    "sample.steps": 50,
  },
  # OT-CFM (arXiv:2302.00482): minibatch optimal transport.
  "ot_cfm": {
    "flow.law.name": "uniform",
    "flow.coupling.name": "optimal_transport",
    "sample.steps": 50,
  },
  # SiT (arXiv:2401.08740): linear path, velocity, SDE sampling.
  "sit": {
    "flow.law.name": "uniform",
    "sample.solver.name": "euler_maruyama",
    "sample.solver.diffusion": "sigma",
    "sample.solver.last_step": "mean",
    "sample.steps": 250,
  },
  # minRF: straight, logit-normal and stratified.
  "minrf": {
    "flow.law.stratified": True,
    "sample.solver.name": "euler",
    "sample.steps": 50,
  },
  # SD3 (arXiv:2403.03206): logit-normal(0, 1), resolution shift 3 at 1024^2.
  "sd3": {
    "flow.law.shift": 3.0,
    "sample.solver.name": "euler",
    "sample.grid.shift": 3.0,
    "sample.steps": 28,
  },
  # FLUX: as SD3, with the shift exp(mu) of its sequence length.
  "flux": {
    "sample.solver.name": "euler",
    "sample.grid.name": "flow_match",
    "sample.grid.source": "even",
    "sample.grid.shift_by": "flux",
    "sample.steps": 28,
  },
  # DDPM (arXiv:2006.11239): linear betas, noise, ancestral sampling.
  "ddpm": {
    "flow.path.name": "ddpm",
    "flow.prediction": "noise",
    "flow.law.name": "uniform",
    "sample.solver.name": "ddpm",
    "sample.grid.name": "leading",
    "sample.steps": 1000,
  },
  # DDIM (arXiv:2010.02502): DDPM's network, eta = 0.
  "ddim": {
    "flow.path.name": "ddpm",
    "flow.prediction": "noise",
    "flow.law.name": "uniform",
    "sample.solver.name": "ddim",
    "sample.grid.name": "leading",
    "sample.steps": 50,
  },
  # iDDPM (arXiv:2102.09672): cosine betas, learned variance.
  "iddpm": {
    "flow.path.name": "cosine",
    "flow.path.steps": 1000,
    "flow.prediction": "noise",
    "flow.law.name": "uniform",
    "flow.learned_variance": True,
    "sample.solver.name": "ddpm",
    "sample.solver.variance": "learned",
    "sample.grid.name": "linspace",
    "sample.steps": 250,
  },
  # Score SDEs (arXiv:2011.13456): variance preserving, sub-VP, exploding. The
  # last is weighted as the others, by 1 for noise, and given EDM's inputs, as
  # its own network sees x + 50 eps unscaled.
  "score_sde_vp": {
    "flow.path.name": "vp",
    "flow.prediction": "noise",
    "flow.law.name": "uniform",
    "sample.solver.name": "euler_maruyama",
    "sample.solver.diffusion": "sbdm",
    "sample.solver.last_step_size": 1e-3,
    "sample.steps": 1000,
  },
  "score_sde_sub_vp": {
    "flow.path.name": "sub_vp",
    "flow.prediction": "noise",
    "flow.law.name": "uniform",
    "sample.solver.name": "euler_maruyama",
    "sample.solver.diffusion": "sbdm",
    "sample.solver.last_step_size": 1e-3,
    "sample.steps": 1000,
  },
  "score_sde_ve": {
    "flow.path.name": "ve",
    "flow.prediction": "edm",
    "flow.law.name": "uniform",
    "flow.weight.name": "snr",
    "sample.solver.name": "euler_maruyama",
    "sample.solver.diffusion": "sbdm",
    "sample.solver.last_step_size": 1e-3,
    "sample.steps": 1000,
  },
  # EDM (arXiv:2206.00364): preconditioning, log-normal sigma, Heun.
  "edm": {
    "flow.path.name": "edm",
    # Below the last of the 18 sigmas, so that the step to 0 is one more.
    "flow.path.sigma_min": 1e-3,
    "flow.prediction": "edm",
    "flow.law.name": "log_normal_sigma",
    "flow.law.mean": -1.2,
    "flow.law.std": 1.2,
    "sample.solver.name": "edm_heun",
    "sample.grid.name": "karras",
    "sample.grid.sigma_min": 2e-3,
    "sample.steps": 18,
  },
  # Latent diffusion and SD1 (arXiv:2112.10752): scaled-linear betas, noise.
  "ldm": {
    "flow.path.name": "scaled_linear",
    "flow.prediction": "noise",
    "flow.law.name": "uniform",
    "sample.solver.name": "ddim",
    "sample.grid.name": "leading",
    "sample.grid.offset": 1,
    "sample.steps": 50,
  },
  "sd1": {
    "flow.path.name": "scaled_linear",
    "flow.prediction": "noise",
    "flow.law.name": "uniform",
    "sample.solver.name": "dpmpp_2m",
    "sample.grid.name": "leading",
    "sample.grid.offset": 1,
    "sample.steps": 25,
  },
  # SD2-v: the same betas, Salimans and Ho's v (arXiv:2202.00512).
  "sd2_v": {
    "flow.path.name": "scaled_linear",
    "flow.prediction": "v",
    "flow.law.name": "uniform",
    "sample.solver.name": "ddim",
    "sample.grid.name": "trailing",
    "sample.steps": 50,
  },
}


def apply(
  config: ml_collections.ConfigDict, name: str
) -> ml_collections.ConfigDict:
  """Gives `config` the flow, solver, grid and steps of a preset; returns it.

  What the preset does not name is as by default; guidance stays.

  Raises ValueError for an unknown name.
  """
  if name not in PRESETS:
    raise ValueError(
      f"There is no preset {name!r}. {schema.closest(name, PRESETS)}"
    )
  plain = experiment.defaults()
  levels = config.flow.levels
  config.flow = plain.flow
  for group in ("steps", "path", "solver", "grid"):
    config.sample[group] = plain.sample[group]
  config.flow.levels = levels
  config.update_from_flattened_dict(PRESETS[name])
  if config.flow.learned_variance:
    config.model.out_channels = 2 * config.model.channels
  return config
