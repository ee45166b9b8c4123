"""Context parallelism: plans, schedules and what moves rows between ranks."""
