"""The replicated log: Raft among the stewards, certificates for everybody else."""
