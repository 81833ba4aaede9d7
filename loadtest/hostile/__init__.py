"""Clients that break the rules, each bounded in number and time; a server must outlive all of them unharmed."""
