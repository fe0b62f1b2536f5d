"""Studies: one base configuration, several arms that differ from it, trained alike and compared (`sltrain study`)."""
