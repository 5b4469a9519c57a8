"""Models of a run that are not there."""

import pytest

from rqgen.evaluation import EvaluationConfig, Run


def test_a_missing_model_is_named():
    run = Run(EvaluationConfig())
    assert run.lacks("tokenizer") == "needs a tokenizer" and run.lacks("prior") == "needs a prior"
    for name in ("tokenizer", "prior", "device"):
        with pytest.raises(ValueError, match=f"Run: expected a {name if name != 'device' else 'model'}, got none"):
            getattr(run, name)
