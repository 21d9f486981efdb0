"""Tables that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flows.arguments import checked
from flows.datasets.tables.columns import choose_columns
from flows.datasets.tables.tabular import Table


@checked
class BreastCancer(Table):
    """Thirty features of the cell nuclei of 569 breast tumours.

    Part of scikit-learn; the diagnosis is left out. [Street, Wolberg & Mangasarian 1993, Nuclear feature extraction for
    breast tumor diagnosis, UCI Breast Cancer Wisconsin (Diagnostic)]

    The values are rounded and some repeat, so likelihoods here compare models but are no entropies.

    Args:
        columns: features to take, by name or position, in this order. Default: all 30.
        validation_fraction, test_fraction, split_seed: see `Table`.

    Example:
        ```python
        import flows

        data = flows.datasets.BreastCancer(columns=[0, 1, 2])
        data.event_shape  # (3,)
        ```
    """

    def __init__(
        self,
        columns: Sequence[str | int] | None = None,
        validation_fraction: float = 0.15,
        test_fraction: float = 0.15,
        split_seed: int = 0,
    ):
        from sklearn.datasets import load_breast_cancer

        data: Any = load_breast_cancer()
        names = [str(feature) for feature in data.feature_names]
        chosen = choose_columns(columns, names, "breast_cancer")
        super().__init__(
            data.data[:, chosen],
            columns=[names[i] for i in chosen],
            name="breast_cancer",
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            source="breast_cancer",
            quiet=True,  # the docstring says it
        )


@checked
class Diabetes(Table):
    """Progression of diabetes in 442 patients given ten columns of a year before.

    Part of scikit-learn. The progression is a whole number from 25 to 346, to which noise of one unit is added. The
    conditions are age, sex (a category), body mass index, mean blood pressure and six blood values s1, ..., s6.
    [Efron, Hastie, Johnstone & Tibshirani 2004, Least angle regression, Annals of Statistics 32, 407]

    Args:
        context_columns: conditions to take, by name. Default: all ten.
        validation_fraction, test_fraction, split_seed: see `Table`.

    Example:
        ```python
        import flows

        data = flows.datasets.Diabetes(context_columns=["age", "bmi"])
        data.event_shape, data.context_shape
        ```
    """

    def __init__(
        self,
        context_columns: Sequence[str] | None = None,
        validation_fraction: float = 0.15,
        test_fraction: float = 0.15,
        split_seed: int = 0,
    ):
        from sklearn.datasets import load_diabetes

        data: Any = load_diabetes(scaled=False)
        names = [str(name) for name in data.feature_names]
        chosen = choose_columns(context_columns, names, "diabetes")
        super().__init__(
            data.target[:, None],
            columns=["progression"],
            name="diabetes",
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            source="diabetes",
            dequantise_columns=["progression"],
            quiet=True,  # the docstring says it
            context={names[i]: data.data[:, i] for i in chosen},
            categories=["sex"] if "sex" in [names[i] for i in chosen] else (),
        )
