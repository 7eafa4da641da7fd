"""Settings of an optimizer that the tests of all kinds share."""

SETTINGS = dict(
    lr=0.02,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    weight_decay_on="matrices",
)
