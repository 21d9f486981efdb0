"""Coefficients of the Runge-Kutta methods, by name.

Each method is a Butcher tableau. With s stages, step length h and state y,

    k_i = f(t + c_i h, y + h Σ_j a_ij k_j),   y′ = y + h Σ_i b_i k_i.

Sources:

- flow5: see below
- tsit5: Tsitouras 2011, Comput. Math. Appl. 62
- dopri5: Dormand & Prince 1980, J. Comput. Appl. Math. 6; embedded weights and middle: Shampine 1986, Math. Comp. 46
- dopri8: the method RK8(7)13M of Prince & Dormand 1981, J. Comput. Appl. Math. 7
- bosh3: Bogacki & Shampine 1989, Appl. Math. Lett. 2
- fehlberg2: Fehlberg 1969, NASA TR R-315
- all others: Hairer, Nørsett & Wanner 1993, II.1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method.

    Args:
        order: the order of the solution.
        nodes: c_2, ..., c_s.
        coefficients: a, one row for each stage but the first.
        weights: b.
        embedded: b̂, the weights of a second solution. The difference h Σ_i (b_i − b̂_i) k_i estimates the error of a
            step. `None`: the method has no estimate and takes fixed steps.
        middle: m, with y(t + h/2) = y + h Σ_i m_i k_i + O(h⁵), for interpolation by a quartic. `None`: interpolate by
            a cubic.
    """

    order: int
    nodes: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    embedded: tuple[float, ...] | None = None
    middle: tuple[float, ...] | None = None

    @property
    def is_adaptive(self) -> bool:
        """Whether the method estimates its error."""
        return self.embedded is not None

    @cached_property
    def error(self) -> tuple[float, ...]:
        """b − b̂ of an adaptive method."""
        assert self.embedded is not None, "a fixed-step method estimates no error"
        return tuple(b - other for b, other in zip(self.weights, self.embedded, strict=True))

    @property
    def last_stage_is_next(self) -> bool:
        """Whether the last stage is also the first stage of the next step ("first same as last")."""
        return self.weights[-1] == 0 and self.coefficients[-1] == self.weights[:-1]

    @property
    def next_is_a_stage(self) -> bool:
        """Whether an adaptive step knows the slope at its end without another evaluation."""
        return self.is_adaptive and self.last_stage_is_next

    @property
    def evaluations(self) -> int:
        """Evaluations of the dynamics per step."""
        return len(self.weights) - (1 if self.next_is_a_stage else 0)

    @cached_property
    def silent(self) -> frozenset[int]:
        """The stages, by index from 0, that have no weight in the end, the error or the middle of a step."""
        results = [row for row in (self.weights, self.embedded, self.middle) if row is not None]
        kept = [self.next_is_a_stage and stage == len(self.nodes) for stage in range(len(self.weights))]
        return frozenset(i for i in range(1, len(kept)) if not kept[i] and not any(row[i] for row in results))

    @cached_property
    def error_constant(self) -> float:
        """|eᵀ A^(p−1) 1| with e = b − b̂ and p the order.

        For y′ = λy, the error estimate of a step is this constant times |λh|^p |y|, to leading order.
        """
        powers = [1.0] * len(self.weights)
        for _ in range(self.order - 1):
            rows = ((), *self.coefficients)
            powers = [sum(a * power for a, power in zip(row, powers, strict=False)) for row in rows]
        return abs(sum(e * power for e, power in zip(self.error, powers, strict=True)))


EULER = RungeKutta(1, (), (), (1.0,))
MIDPOINT = RungeKutta(2, (1 / 2,), ((1 / 2,),), (0.0, 1.0))
HEUN2 = RungeKutta(2, (1.0,), ((1.0,),), (1 / 2, 1 / 2))
HEUN3 = RungeKutta(3, (1 / 3, 2 / 3), ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4))
# The 3/8 rule: its error is smaller than that of the classical method of order four.
RK4 = RungeKutta(4, (1 / 3, 2 / 3, 1.0), ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8))

ADAPTIVE_HEUN = RungeKutta(2, (1.0,), ((1.0,),), (1 / 2, 1 / 2), embedded=(1.0, 0.0))
FEHLBERG2 = RungeKutta(
    2, (1 / 2, 1.0), ((1 / 2,), (1 / 256, 255 / 256)), (1 / 512, 255 / 256, 1 / 512), embedded=(1 / 256, 255 / 256, 0.0)
)
BOSH3 = RungeKutta(
    3,
    (1 / 2, 3 / 4, 1.0),
    ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    (2 / 9, 1 / 3, 4 / 9, 0.0),
    embedded=(7 / 24, 1 / 4, 1 / 3, 1 / 8),
)
DOPRI5 = RungeKutta(
    5,
    (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    embedded=(1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60),
    middle=(
        6025192743 / 60171106304,
        0.0,
        51252292925 / 130801643196,
        -2691868925 / 90256659456,
        187940372067 / 3189068634112,
        -1776094331 / 39487288512,
        11237099 / 470086768,
    ),
)
# Order five with the quadrature nodes 0, 3/16, 1/2, 13/16, 1, close to those of Lobatto's rule of order eight. A flow
# needs short steps for the integral of its divergence, which is a quadrature along the path. The nodes fix all
# coefficients if each stage has order three, but for the second, whose weight is 0 [Dormand & Prince 1980, section 3].
# They fix the embedded solution up to its distance from the solution. At tolerances of 1e-5, log-densities have a
# quarter of the error that they have by dopri5.
FLOW5 = RungeKutta(
    5,
    (1 / 8, 3 / 16, 1 / 2, 13 / 16, 1.0, 1.0),
    (
        (1 / 8,),
        (3 / 64, 9 / 64),
        (11 / 18, -7 / 3, 20 / 9),
        (-12493 / 9216, 5083 / 768, -3185 / 576, 1105 / 1024),
        (2369 / 603, -3980 / 201, 277264 / 15075, -4082 / 1675, 1536 / 1675),
        (67 / 1170, 0.0, 4096 / 14625, 122 / 375, 4096 / 14625, 67 / 1170),
    ),
    (67 / 1170, 0.0, 4096 / 14625, 122 / 375, 4096 / 14625, 67 / 1170, 0.0),
    embedded=(216 / 3965, 0.0, 85408 / 297375, 7243 / 22875, 85408 / 297375, 1541 / 25376, -1 / 160),
    middle=(869 / 36600, 0.0, 185408 / 495625, 8854 / 114375, 5248 / 114375, 1407 / 158600, -3 / 100),
)
TSIT5 = RungeKutta(
    5,
    (0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    (
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
    ),
    (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0),
    embedded=(
        0.09468075576583945,
        0.009183565540343254,
        0.4877705284247616,
        1.234297566930479,
        -2.7077123499835256,
        1.866628418170587,
        1 / 66,
    ),
    middle=(
        0.10741235230096871,
        0.01135625,
        0.39560903056045305,
        -0.34475214352593553,
        1.3161853649581645,
        -1.0170608542936508,
        0.031249999999999993,
    ),
)
DOPRI8 = RungeKutta(
    8,
    (
        1 / 18,
        1 / 12,
        1 / 8,
        5 / 16,
        3 / 8,
        59 / 400,
        93 / 200,
        5490023248 / 9719169821,
        13 / 20,
        1201146811 / 1299019798,
        1.0,
        1.0,
        1.0,
    ),
    (
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (29443841 / 614563906, 0.0, 0.0, 77736538 / 692538347, -28693883 / 1125000000, 23124283 / 1800000000),
        (
            16016141 / 946692911,
            0.0,
            0.0,
            61564180 / 158732637,
            22789713 / 633445777,
            545815736 / 2771057229,
            -180193667 / 1043307555,
        ),
        (
            39632708 / 573591083,
            0.0,
            0.0,
            -433636366 / 683701615,
            -421739975 / 2616292301,
            100302831 / 723423059,
            790204164 / 839813087,
            800635310 / 3783071287,
        ),
        (
            246121993 / 1340847787,
            0.0,
            0.0,
            -37695042795 / 15268766246,
            -309121744 / 1061227803,
            -12992083 / 490766935,
            6005943493 / 2108947869,
            393006217 / 1396673457,
            123872331 / 1001029789,
        ),
        (
            -1028468189 / 846180014,
            0.0,
            0.0,
            8478235783 / 508512852,
            1311729495 / 1432422823,
            -10304129995 / 1701304382,
            -48777925059 / 3047939560,
            15336726248 / 1032824649,
            -45442868181 / 3398467696,
            3065993473 / 597172653,
        ),
        (
            185892177 / 718116043,
            0.0,
            0.0,
            -3185094517 / 667107341,
            -477755414 / 1098053517,
            -703635378 / 230739211,
            5731566787 / 1027545527,
            5232866602 / 850066563,
            -4093664535 / 808688257,
            3962137247 / 1805957418,
            65686358 / 487910083,
        ),
        (
            403863854 / 491063109,
            0.0,
            0.0,
            -5068492393 / 434740067,
            -411421997 / 543043805,
            652783627 / 914296604,
            11173962825 / 925320556,
            -13158990841 / 6184727034,
            3936647629 / 1978049680,
            -160528059 / 685178525,
            248638103 / 1413531060,
            0.0,
        ),
        (
            14005451 / 335480064,
            0.0,
            0.0,
            0.0,
            0.0,
            -59238493 / 1068277825,
            181606767 / 758867731,
            561292985 / 797845732,
            -1041891430 / 1371343529,
            760417239 / 1151165299,
            118820643 / 751138087,
            -528747749 / 2220607170,
            1 / 4,
        ),
    ),
    (
        14005451 / 335480064,
        0.0,
        0.0,
        0.0,
        0.0,
        -59238493 / 1068277825,
        181606767 / 758867731,
        561292985 / 797845732,
        -1041891430 / 1371343529,
        760417239 / 1151165299,
        118820643 / 751138087,
        -528747749 / 2220607170,
        1 / 4,
        0.0,
    ),
    embedded=(
        13451932 / 455176623,
        0.0,
        0.0,
        0.0,
        0.0,
        -808719846 / 976000145,
        1757004468 / 5645159321,
        656045339 / 265891186,
        -3867574721 / 1518517206,
        465885868 / 322736535,
        53011238 / 667516719,
        2 / 45,
        0.0,
        0.0,
    ),
    # The dense output of the method, evaluated at the middle of the step.
    middle=(
        0.04103130360739401238,
        0.0,
        0.0,
        0.0,
        0.0,
        0.05100562801991344569,
        0.23889306774121999661,
        0.30968701439961029227,
        -0.21723254717553502901,
        0.07833405679331924617,
        -0.00186143697155802603,
        0.00707284420267845214,
        0.00690847373200509374,
        -0.01383840434904748396,
    ),
)

RUNGE_KUTTA: Mapping[str, RungeKutta] = {
    "euler": EULER,
    "midpoint": MIDPOINT,
    "heun2": HEUN2,
    "heun3": HEUN3,
    "rk4": RK4,
    "adaptive_heun": ADAPTIVE_HEUN,
    "fehlberg2": FEHLBERG2,
    "bosh3": BOSH3,
    "flow5": FLOW5,
    "tsit5": TSIT5,
    "dopri5": DOPRI5,
    "dopri8": DOPRI8,
}
