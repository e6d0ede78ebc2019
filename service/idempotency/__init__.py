"""`Idempotency-Key`: a repeated POST has one effect and one answer.
The answer is stored in the transaction of the effect."""
