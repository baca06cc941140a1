"""What the process and the machine give: durable files, memory, ranks, device names, the type of a progress callback."""
