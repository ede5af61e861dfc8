"""The operator: carries FederatedDiffusionJobs out on Kubernetes, and keeps every owner's privacy ledger there."""
