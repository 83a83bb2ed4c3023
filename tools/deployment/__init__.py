"""What a federation on real nodes needs: SuperLinks, SuperNodes, their keys and processes."""
