"""The key that was meant, where one is unknown."""
import pytest

from harness.keys import meant


@pytest.mark.parametrize("path, words", [
    (("step",), "did you mean 'steps'?"),                        # and not schedule.points.step, which is that word
    (("layers",), "did you mean 'model.layers'?"),
    (("momentum",), "did you mean 'optim.<group>.momentum'?"),
    (("model", "n_layers"), "did you mean 'model.layers'?")])
def test_a_near_key_in_its_place_comes_before_the_same_word_elsewhere(path, words):
    assert meant(path) == words
