"""The plan of a job, as pure functions: its stages and units, what each depends on (artifact keys), what each costs.
Shared by the API, the workers and the benchmarks; reads no file, database or network."""
