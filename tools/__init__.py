"""What looks at runs and engines from outside: studies, reports, speed."""
