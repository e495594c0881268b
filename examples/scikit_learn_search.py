"""A scikit-learn script, moved to safepool's workers: what changed is marked.

    python examples/scikit_learn_search.py             # in safepool's workers
    python examples/scikit_learn_search.py --before    # as it was, in joblib's own

It searches parameters, scores the best model on folds, and asks which features matter: three
calls that share one set of workers. Both ways print the same; the models are the same code.
"""

from __future__ import annotations

import argparse
import contextlib

from sklearn.datasets import load_breast_cancer
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import safepool  # new


def study() -> None:
    """Search, score, explain: not a line of it is new."""
    data = load_breast_cancer()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    grid = {"logisticregression__C": [0.01, 0.1, 1.0, 10.0]}

    search = GridSearchCV(model, grid, cv=4, n_jobs=-1).fit(data.data, data.target)
    print("best:", search.best_params_)

    best = search.best_estimator_
    scores = cross_val_score(best, data.data, data.target, cv=8, n_jobs=-1)
    print(f"accuracy: {scores.mean():.4f}")

    importance = permutation_importance(
        best, data.data, data.target, n_repeats=3, random_state=0, n_jobs=-1
    )
    print("most important:", data.feature_names[importance.importances_mean.argmax()])


def main() -> None:
    """Run the study in the workers that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", action="store_true", help="joblib's own workers")
    before = parser.parse_args().before
    # In a script that needs no choice: ``with safepool.parallel_backend(): study()``
    with contextlib.nullcontext() if before else safepool.parallel_backend(retries=1):  # new
        study()


if __name__ == "__main__":
    main()
