"""The ledger of a study over Optuna's storage: who runs what, and what is finished."""
