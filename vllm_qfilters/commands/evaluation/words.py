"""Words that names are made of, and that mean little to a prompt."""

_ADJECTIVES = """
    amber ancient bitter brave bright broken calm clever cold crimson dark dusty early eager faint fancy
    foreign frozen gentle giant golden green hidden hollow humble jolly late little lonely lucky mellow narrow
    noble old pale plain proud quick quiet rapid rough royal rusty sacred sharp shy silent silver simple
    sleepy small smooth soft stern strange sunny sweet tall tender tiny warm wild wise
"""
_NOUNS = """
    anchor apple arrow badge barrel basket beacon bell boat book bottle bridge bucket button candle castle
    chair clock cloud coin comet crown desk drum eagle falcon feather fiddle forest garden harbor hammer
    island jacket kettle ladder lamp lantern lion marble meadow mirror needle orchard otter paddle parrot
    pebble pencil piano pillow planet pocket rabbit ribbon river saddle shovel spoon table temple tiger tower
    tunnel valley violin wagon whistle window
"""

ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
