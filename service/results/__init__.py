"""Results of jobs: publishing them, reading them in pages, exporting them, explaining a sample, the audit record.
Weights are stored in chunks whose Merkle root is part of the provenance."""
