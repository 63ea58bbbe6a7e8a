"""One judge of digits for all commands, which takes seconds to fit."""

import hashlib

import numpy as np
import pytest

from flowjax.evaluate import classifier

_FITTED: dict = {}


@pytest.fixture(autouse=True, scope="module")
def _fitted_once():
  fit = classifier.fit

  def once(images_NHWC, labels_N, **options):
    content = hashlib.sha256(np.ascontiguousarray(images_NHWC).tobytes())
    content.update(np.asarray(labels_N).tobytes())
    key = (content.digest(), np.shape(images_NHWC), *sorted(options.items()))
    if key not in _FITTED:
      _FITTED[key] = fit(images_NHWC, labels_N, **options)
    return _FITTED[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(classifier, "fit", once)
    yield
