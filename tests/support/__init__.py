"""What tests share: tiny runs and configurations, servers with faults, hosts and ranks on one machine."""
