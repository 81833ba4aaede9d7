"""The soak: mixed traffic, churn and hostile clients on one server for minutes or hours, and what it leaves behind."""
