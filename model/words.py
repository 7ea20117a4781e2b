"""The words that the tasks are made of, and which of them a tokenizer holds in one piece."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FEMALE_NAMES = _listed(
    "Alice Amanda Amy Andrea Angela Ann Anna Anne Ashley Barbara Betty Beth Carol Caroline Catherine Charlotte Christina Christine "
    "Claire Clara Cynthia Deborah Diana Diane Donna Dorothy Elizabeth Ella Ellen Emily Emma Eva Frances Grace Hannah Heather Helen "
    "Irene Isabella Jane Janet Jennifer Jessica Joan Joyce Judith Judy Julia Julie Karen Kate Katherine Kathy Kim Laura Lauren Lily "
    "Linda Lisa Liz Louise Lucy Margaret Maria Marie Martha Mary Megan Melissa Michelle Nancy Nicole Olivia Pamela Patricia Rachel "
    "Rebecca Rose Ruth Samantha Sandra Sara Sarah Sharon Sophia Sophie Stephanie Susan Teresa Victoria Virginia Wendy"
)
MALE_NAMES = _listed(
    "Aaron Adam Alan Albert Alexander Andrew Anthony Arthur Ben Benjamin Bill Bob Brian Carl Charles Christopher Colin Craig Daniel "
    "Dave David Dennis Donald Douglas Edward Eric Ethan Francis Frank Fred Gary George Graham Greg Harold Harry Henry Howard Hugh Ian "
    "Jack Jacob James Jason Jeff Jeremy Jim Joe John Jonathan Joseph Joshua Justin Keith Kenneth Kevin Larry Lawrence Leon Louis Luke "
    "Mark Martin Matt Matthew Max Michael Mike Nathan Neil Nicholas Nick Oliver Oscar Patrick Paul Peter Phil Philip Ralph Ray Richard "
    "Rick Robert Roger Ron Roy Ryan Sam Samuel Scott Sean Simon Stephen Steve Steven Stuart Ted Thomas Tim Timothy Tom Tony Victor "
    "Vincent Walter William"
)

# Singular and plural; people first, since only they like, know or follow others.
PEOPLE = (
    ("actor", "actors"), ("architect", "architects"), ("artist", "artists"), ("athlete", "athletes"), ("author", "authors"), ("banker", "bankers"),
    ("boy", "boys"), ("brother", "brothers"), ("builder", "builders"), ("captain", "captains"), ("coach", "coaches"), ("cousin", "cousins"),
    ("customer", "customers"), ("dancer", "dancers"), ("daughter", "daughters"), ("designer", "designers"), ("director", "directors"),
    ("doctor", "doctors"), ("driver", "drivers"), ("editor", "editors"), ("engineer", "engineers"), ("expert", "experts"), ("farmer", "farmers"),
    ("father", "fathers"), ("friend", "friends"), ("gardener", "gardeners"), ("girl", "girls"), ("guard", "guards"), ("guest", "guests"),
    ("guide", "guides"), ("hunter", "hunters"), ("journalist", "journalists"), ("judge", "judges"), ("king", "kings"), ("knight", "knights"),
    ("lawyer", "lawyers"), ("leader", "leaders"), ("manager", "managers"), ("merchant", "merchants"), ("minister", "ministers"),
    ("mother", "mothers"), ("musician", "musicians"), ("neighbor", "neighbors"), ("nurse", "nurses"), ("officer", "officers"), ("owner", "owners"),
    ("painter", "painters"), ("parent", "parents"), ("patient", "patients"), ("pilot", "pilots"), ("player", "players"), ("poet", "poets"),
    ("priest", "priests"), ("prisoner", "prisoners"), ("professor", "professors"), ("pupil", "pupils"), ("queen", "queens"), ("sailor", "sailors"),
    ("scientist", "scientists"), ("senator", "senators"), ("servant", "servants"), ("singer", "singers"), ("sister", "sisters"),
    ("soldier", "soldiers"), ("son", "sons"), ("student", "students"), ("surgeon", "surgeons"), ("teacher", "teachers"), ("tourist", "tourists"),
    ("uncle", "uncles"), ("visitor", "visitors"), ("waiter", "waiters"), ("worker", "workers"), ("writer", "writers"),
)  # fmt: skip
THINGS = (
    ("apple", "apples"), ("bird", "birds"), ("boat", "boats"), ("book", "books"), ("bottle", "bottles"), ("box", "boxes"), ("bridge", "bridges"),
    ("building", "buildings"), ("bus", "buses"), ("camera", "cameras"), ("car", "cars"), ("castle", "castles"), ("cat", "cats"), ("chair", "chairs"),
    ("church", "churches"), ("city", "cities"), ("clock", "clocks"), ("cloud", "clouds"), ("coat", "coats"), ("cow", "cows"), ("cup", "cups"),
    ("dog", "dogs"), ("door", "doors"), ("engine", "engines"), ("farm", "farms"), ("field", "fields"), ("flag", "flags"), ("flower", "flowers"),
    ("forest", "forests"), ("garden", "gardens"), ("gate", "gates"), ("guitar", "guitars"), ("hat", "hats"), ("hill", "hills"), ("horse", "horses"),
    ("hotel", "hotels"), ("house", "houses"), ("island", "islands"), ("key", "keys"), ("lamp", "lamps"), ("letter", "letters"),
    ("machine", "machines"), ("map", "maps"), ("mountain", "mountains"), ("museum", "museums"), ("painting", "paintings"), ("phone", "phones"),
    ("picture", "pictures"), ("plane", "planes"), ("plant", "plants"), ("plate", "plates"), ("restaurant", "restaurants"), ("river", "rivers"),
    ("road", "roads"), ("room", "rooms"), ("school", "schools"), ("shirt", "shirts"), ("shoe", "shoes"), ("shop", "shops"), ("song", "songs"),
    ("star", "stars"), ("street", "streets"), ("table", "tables"), ("tower", "towers"), ("town", "towns"), ("train", "trains"), ("tree", "trees"),
    ("truck", "trucks"), ("village", "villages"), ("wall", "walls"), ("window", "windows"),
)  # fmt: skip
# Adjectives that fit people and things alike.
ADJECTIVES = _listed(
    "old new young big small tall famous strange beautiful quiet large little other good great nice poor dirty clean ordinary lovely "
    "remarkable unusual wonderful interesting important special strong weak early local foreign modern ancient expensive perfect dark "
    "red"
)
# Forms after a singular and after a plural subject.
COPULAS = (("is", "are"), ("was", "were"), ("has", "have"))
# What people do to people, third person singular and plural.
RELATIONS = (
    ("admires", "admire"), ("avoids", "avoid"), ("follows", "follow"), ("hates", "hate"), ("helps", "help"), ("knows", "know"), ("likes", "like"),
    ("loves", "love"), ("remembers", "remember"), ("respects", "respect"), ("sees", "see"), ("supports", "support"), ("trusts", "trust"),
    ("understands", "understand"), ("visits", "visit"), ("wants", "want"),
)  # fmt: skip

PLACES = _listed("store park school office restaurant hospital station garden market library museum church beach hotel cafe bank")
GIFTS = _listed("drink book ring letter ball key flower gift coat card map camera hat ticket cake pen basket phone box")

# What lasts from one year to another.
EVENTS = _listed(
    "war siege reign voyage project campaign conflict dispute journey expedition mission program construction struggle revolt battle "
    "tour trial exhibition contract treaty plague drought search alliance rebellion occupation partnership renovation"
)
# What people of a profession did, never in a word of the profession's own stem; the professions go with "a", not "an".
BIOGRAPHIES: dict[str, tuple[str, ...]] = {
    "nurse": ("cared for patients in a hospital", "looked after patients in a hospital", "gave patients their medicine in a clinic"),
    "lawyer": ("defended clients in court", "went to court to defend clients", "gave clients advice about the law"),
    "teacher": ("taught children at a small school", "helped the children to read and write", "gave lessons to children in a school"),
    "professor": ("taught physics at a large university", "gave lectures at the university", "published research and taught at a university"),
    "doctor": ("treated sick people in a clinic", "examined patients and prescribed medicine", "treated many patients in a small town"),
    "journalist": ("reported news for a newspaper", "wrote stories for the daily newspaper", "interviewed politicians for a newspaper"),
    "farmer": ("grew corn and raised cattle", "raised cows and sheep in the country", "grew wheat and kept chickens"),
    "pilot": ("flew planes for an airline", "flew large planes across the ocean", "flew passenger planes around the world"),
    "chef": ("cooked meals in a restaurant", "ran the kitchen of a famous restaurant", "cooked dinner in a large hotel"),
    "soldier": ("fought in the army during the war", "joined the army to defend the country", "fought in several battles"),
    "musician": ("played the violin in a band", "played the piano in many concerts", "played the guitar and the drums"),
    "photographer": ("took pictures with a camera", "took pictures of weddings and families", "used a camera to take portraits"),
}
NUMBER_WORDS = _listed("one two three four five six seven eight nine ten eleven twelve")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, asked which words it holds as one token inside a sentence (after a space)."""

    tokenizer: Any

    def single(self, words: Iterable[str]) -> tuple[str, ...]:
        """Those of `words` that are one known token after a space, in their order."""
        candidates = list(dict.fromkeys(words))
        if not candidates:
            return ()
        before = "the"
        start = self.tokenizer(before, add_special_tokens=False)["input_ids"]
        encoded = self.tokenizer([f"{before} {word}" for word in candidates], add_special_tokens=False)["input_ids"]
        unknown = self.tokenizer.unk_token_id
        return tuple(w for w, ids in zip(candidates, encoded, strict=True) if ids[:-1] == start and ids[-1] != unknown)

    def single_forms(self, forms: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
        """Those pairs of forms of which both are one token."""
        listed = list(forms)
        kept = set(self.single(word for pair in listed for word in pair))
        return tuple(pair for pair in listed if kept.issuperset(pair))
