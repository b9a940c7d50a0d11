import math

import numpy as np
import pytest

from shared.optimisation.schedules import cosine_schedule, teacher_temperature_schedule


def test_cosine_schedule_equals_its_formula():
    values = cosine_schedule(base=2.0, final=0.5, epochs=5, steps_per_epoch=4, warmup_epochs=2, start=0.1)
    warmup = [0.1 + (2.0 - 0.1) * i / 7 for i in range(8)]  # both ends included
    cosine = [0.5 + (2.0 - 0.5) / 2 * (1 + math.cos(math.pi * j / 12)) for j in range(12)]
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, warmup + cosine, rtol=1e-14)


def test_base_appears_twice_after_a_warmup_and_final_is_not_reached():
    values = cosine_schedule(base=1.0, final=0.0, epochs=10, steps_per_epoch=3, warmup_epochs=1)
    assert values[0] == 0 and list(values).count(1.0) == 2
    assert 0 < values[-1] < 0.01


@pytest.mark.parametrize("warmup_epochs, epochs", [(0, 0), (3, 3)])
def test_there_is_one_value_per_step_even_without_a_cosine(warmup_epochs, epochs):
    assert len(cosine_schedule(1.0, 0.0, epochs, 5, warmup_epochs)) == 5 * epochs


def test_a_warmup_may_last_part_of_an_epoch():
    values = cosine_schedule(1.0, 0.0, epochs=2, steps_per_epoch=10, warmup_epochs=0.5)
    np.testing.assert_allclose(values[:5], np.linspace(0, 1, 5))
    assert len(values) == 20 and values[5] == 1.0


def test_teacher_temperature_warms_up_including_both_ends():
    np.testing.assert_allclose(
        teacher_temperature_schedule(0.04, 0.07, warmup_epochs=4, epochs=6), [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]
    )


def test_a_warmup_longer_than_training_is_refused():
    with pytest.raises(ValueError, match="warm-up of 4 epochs does not fit into 3 epochs"):
        cosine_schedule(1.0, 0.0, epochs=3, steps_per_epoch=2, warmup_epochs=4)
    with pytest.raises(ValueError, match="temperature warm-up of 4 epochs does not fit into 3 epochs"):
        teacher_temperature_schedule(0.04, 0.07, warmup_epochs=4, epochs=3)
