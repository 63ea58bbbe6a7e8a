"""Names of clusters, and what is said of those that there are not."""

import pytest

from flowjax import errors
from flowjax.parallel import topology


@pytest.mark.parametrize(
  "name, slices, size, domain",
  [
    ("v5p:8x8x8", 1, 512, 512),
    ("v5p:2x2x1", 1, 4, 4),
    ("v5e:16x16", 2, 512, 256),
    ("v6e:2x4", 1, 8, 8),
    ("tpu7x:2x2x2", 1, 16, 16),
    ("h100:16x8", 1, 128, 8),
  ],
)
def test_sizes(name, slices, size, domain):
  found = topology.parse(name, slices)
  assert (found.size, found.domain) == (size, domain)
  assert found.name == name


@pytest.mark.parametrize(
  "name, slices, said",
  [
    ("v5q:8x8x8", 1, "Did you mean 'v5p'?"),
    ("v5p:8x8", 1, "v5p takes 3 numbers, such as v5p:8x8x8"),
    ("v5p:8x8x", 1, "v5p takes 3 numbers"),
    ("v5e:3x5", 1, "Nearest: v5e:2x4"),
    ("v5p:9x8x8", 1, "Nearest: v5p:8x8x8"),
    ("v6e:32x32", 1, "Nearest: v6e:16x16"),
    ("h100:16x16", 1, "h100:32x8"),
    ("h100:16x8", 2, "h100:32x8"),
    ("v5p", 1, "v5p takes 3 numbers"),
  ],
)
def test_what_there_is_not_names_what_is_near(name, slices, said):
  with pytest.raises(errors.UserError, match="--topology") as caught:
    topology.parse(name, slices)
  assert said in str(caught.value)


@pytest.mark.parametrize("name", ["v4:2x2x2", "v5e:2x4", "v5p:2x2x2"])
def test_described_devices_are_as_many_as_its_name_says(name):
  where = topology.parse(name)
  if not topology.is_installed(where):
    pytest.skip("libtpu is not installed (flowjax[tpu-aot])")
  topology.prepare()
  devices = topology.devices(where)
  assert len(devices) == where.size
  assert {device.device_kind for device in devices} == {where.chip.kind}
