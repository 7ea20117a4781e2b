"""What people look at an atlas through: the report, and the same page alive over an atlas."""
