"""Regressors of other packages, each of which uci.py runs in a process and an environment of its
own.

They get standardised rows, and return means and standard deviations of normal laws, ``(components,
rows)``. Run: python examples/uci_rivals.py METHOD ROWS.npz PREDICTIONS.npz
"""

import sys
import time

import numpy as np


def bde(x, y):
    """MILE: chains of microcanonical Langevin dynamics from trained members (Sommer et al. 2025);
    the settings of its README.
    """
    from bde import BdeRegressor
    from bde.loss import GaussianNLL

    fitted = BdeRegressor(
        n_members=8,
        hidden_layers=[16, 16],
        epochs=200,
        loss=GaussianNLL(),
        seed=0,
        warmup_steps=5000,
        n_samples=2000,
        n_thinning=2,
        patience=10,
    ).fit(x, y)

    def predict(x_new):  # every draw of every member is a component
        raw = np.asarray(fitted.predict(x_new, raw=True), np.float64).reshape(
            -1, len(x_new), 2
        )
        return raw[..., 0], np.logaddexp(0, raw[..., 1]) + 1e-6  # as its loss has it

    return predict


def ngboost(x, y):
    from ngboost import NGBRegressor
    from sklearn.model_selection import train_test_split

    x, x_stop, y, y_stop = train_test_split(x, y, test_size=0.1, random_state=0)
    booster = NGBRegressor(n_estimators=2000, random_state=0, verbose=False)
    booster.fit(x, y, x_stop, y_stop, early_stopping_rounds=50)

    def predict(x_new):
        found = booster.pred_dist(x_new, max_iter=booster.best_val_loss_itr)
        return found.params["loc"][None], found.params["scale"][None]

    return predict


def catboost(x, y):
    from catboost import CatBoostRegressor
    from sklearn.model_selection import train_test_split

    x, x_stop, y, y_stop = train_test_split(x, y, test_size=0.1, random_state=0)
    booster = CatBoostRegressor(
        loss_function="RMSEWithUncertainty",
        random_seed=0,
        verbose=False,
        allow_writing_files=False,
        thread_count=1,
    ).fit(x, y, eval_set=(x_stop, y_stop), early_stopping_rounds=50)

    def predict(x_new):
        mean, variance = booster.predict(x_new).T
        return mean[None], np.sqrt(variance)[None]

    return predict


def forest(x, y):
    """Means of one forest; a second one learns its squared errors on rows out of bag."""
    from sklearn.ensemble import RandomForestRegressor

    first = RandomForestRegressor(500, oob_score=True, random_state=0).fit(x, y)
    second = RandomForestRegressor(500, min_samples_leaf=10, random_state=0)
    second.fit(x, (y - first.oob_prediction_) ** 2)
    return lambda x_new: (first.predict(x_new)[None], np.sqrt(second.predict(x_new))[None])


def gp(x, y):
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    kernel = ConstantKernel() * RBF(np.ones(x.shape[1]), (1e-2, 1e3)) + WhiteKernel(0.1)
    process = GaussianProcessRegressor(kernel).fit(x, y)
    return lambda x_new: np.stack(process.predict(x_new, return_std=True))[:, None]


METHODS = {"bde": bde, "ngboost": ngboost, "catboost": catboost, "forest": forest, "gp": gp}


def main() -> None:
    method, source, target = sys.argv[1:]
    rows = np.load(source)
    begun = time.process_time()
    predict = METHODS[method](rows["x"].astype(np.float32), rows["y"].astype(np.float32))
    seconds = time.process_time() - begun
    loc, scale = predict(rows["x_new"].astype(np.float32))
    np.savez(target, loc=loc, scale=scale, seconds=seconds)


if __name__ == "__main__":
    main()
