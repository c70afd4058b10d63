"""lowtide inside other people's trainers; nothing of lowtide imports these."""
