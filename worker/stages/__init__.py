"""The stages of a job. `plan` says which units there are and what their artifacts depend on; each other module does one
stage: it reads artifacts, calls the numerical core, writes one artifact, and knows no database."""
