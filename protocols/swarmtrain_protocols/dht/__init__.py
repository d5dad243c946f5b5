"""Kademlia for finding things: stewards, addresses, chunk holders. It never decides (spec 03)."""
