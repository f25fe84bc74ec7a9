"""What people see: tables, progress, logs and figures."""
