"""What a step costs where its peers live so or so, before anything is started."""
