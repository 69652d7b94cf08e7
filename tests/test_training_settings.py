"""What settings of a training go together."""

import pytest
from flat_settings import flat
from test_token_router import FORM, SETTINGS

from meteora_jax.config import InputError
from meteora_jax.training.settings import GateTraining


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (dict(lm_loss=False), "lm_loss: expected a token router"),
        (dict(response_weight=0.5), "prompt_loss: expected none with a response_weight"),
        (dict(response_weight=1.5, prompt_loss=False), "response_weight: expected a share"),
        (dict(start_weight=0.5, prompt_loss=False), "start_weight: expected 0 without a response_weight, found 0.5"),
        (dict(form=FORM, lm_loss=False, segment_weight=-1.0), "segment_weight: expected 0 or more, found -1"),
        (dict(segment_weight=0.5), "segment_weight: expected 0 with lm_loss, found 0.5"),
    ],
)
def test_what_its_training_needs_is_said(how, said):
    with pytest.raises(InputError, match=said):
        flat(GateTraining, **SETTINGS, **how)
