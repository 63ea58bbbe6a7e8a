"""Text to image, end to end: train on captioned scenes, and score obedience.

  python launch/demo_text.py [WORKDIR [--config.KEY=VALUE ...]]

WORKDIR is runs/demo-text by default. It runs the same commands that are
printed, so each can be repeated by hand. Exits with 1 if a score is not what it
should be.
"""

import pathlib
import sys

import demo

PROMPTS = (
  "a red 3 to the left of a blue 7",
  "a green 5 above a white 2",
  "a yellow 8, a purple 1 to its right and a red 4 below it",
  "there is a blue 0",
)


def main(workdir: str = "runs/demo-text", *overrides: str) -> int:
  """Runs the demo into `workdir` and returns an exit code."""
  config = f"--config={demo.HERE / 'configs/scenes_mmdit.py'}"
  # What is not of the config belongs to the scores: --num=..., --judge_steps.
  of_config = [word for word in overrides if word.startswith("--config.")]
  of_scores = [word for word in overrides if word not in of_config]
  into = f"--workdir={workdir}"
  commands = [
    ["train", config, into, *of_config],
    ["evaluate", into, *of_scores],
    ["sample", into, f"--out={workdir}/prompts.png"]
    + [f"--prompt={prompt}" for prompt in PROMPTS],
  ]
  files = {**demo.FILES, "pictures of prompts": "prompts.png"}
  return demo.tell(commands, pathlib.Path(workdir), goals, files)


def goals(report: dict) -> dict[str, bool]:
  """Returns what the demo promises, and whether the report keeps it."""
  seen, judge = report["seen"], report["judge"]
  return {
    "the judge sees at least 95% of the digits of real held-out scenes": (
      judge["digits"] >= 0.95
    ),
    "with guidance, at least 85% of the digits of seen captions": (
      seen["digits"] >= 0.85
    ),
    "at least 95% of the colours": seen["colours"] >= 0.95,
    "at least 85% of the relations": seen["relations"] >= 0.85,
    "other captions are not obeyed: less than half of each": all(
      value < 0.5 for value in report["shuffled"].values()
    ),
  }


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
