"""The commands there are, by name: each is the file of that name."""

COMMANDS = {
  "train": "train a network from a config, or continue a workdir",
  "encode": "turn a source into latents and embedded texts, once for all",
  "sample": "draw a grid of samples from a workdir",
  "evaluate": "score the samples of a workdir against held-out data",
  "compare": "draw several workdirs side by side, with their scores",
  "export": "write the weights of a workdir for PyTorch, diffusers and others",
  "import": "make a workdir of weights from diffusers and others",
  "describe": "show parameters, FLOPs, sharding and memory of a config",
  "bench": "time the training step of a config on this machine",
  "plan": "see whether a config fits a cluster, and how fast it would be",
  "doctor": "see what works on this machine, or in this job, and what is off",
}

# All others are run by all processes of a job together.
ALONE = ("describe", "plan")
