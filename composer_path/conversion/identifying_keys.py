"""Which keys of a free object hold what may tell who a patient is, by their names.

After the identifiers that the Safe Harbor method of HIPAA names (45 CFR 164.514(b)(2): names, places, dates, telephone
and other numbers, addresses, pictures) and the attributes of DICOM that hold them. What a text says isn't looked at.
"""

from __future__ import annotations

import re
from functools import lru_cache

from composer_path.records.key_names import canonical

# In the spelling of `canonical`: small letters and digits only.
IDENTIFYING_KEYS = {
    **dict.fromkeys(("id", "uid", "uuid", "guid", "recordid", "sampleid", "reportid"), "id"),
    **dict.fromkeys(("patient", "case", "caseid", "caseno", "casenumber", "mrn", "pid", "pat", "patid"), "patient"),
    **dict.fromkeys(("subject", "subjectid", "participant", "participantid", "person", "personid", "donor"), "patient"),
    **dict.fromkeys(("donorid", "fallnummer", "befundnummer", "ipp", "nhs", "nhsnumber", "nhsno"), "patient"),
    **dict.fromkeys(("slide", "slideid", "slidename", "wsi", "wsiid", "barcode", "slidebarcode"), "slide"),
    **dict.fromkeys(("accession", "accessionno", "accessionid", "block", "blockid", "container"), "specimen"),
    **dict.fromkeys(("specimen", "specimenid", "biopsyid", "labid", "labnumber", "einsendenummer"), "specimen"),
    **dict.fromkeys(("image", "imageid", "imagename", "imagepath", "imagefile", "images", "img", "imgid"), "image"),
    **dict.fromkeys(("file", "fileid", "filename", "filepath", "path", "url", "uri", "href", "link", "src"), "image"),
    **dict.fromkeys(
        ("name", "names", "surname", "forename", "initials", "alias", "nom", "prenom", "vorname"), "person"
    ),
    **dict.fromkeys(("nachname", "apellido", "nombre", "cognome", "attending", "physician", "doctor"), "person"),
    **dict.fromkeys(("pathologist", "surgeon", "operator", "clinician", "reader", "signedby", "reportedby"), "person"),
    **dict.fromkeys(("author", "annotator", "reviewer", "user", "username", "login", "contact", "mother"), "person"),
    **dict.fromkeys(("email", "emails", "mail", "phone", "tel", "telephone", "mobile", "fax", "pager"), "contact"),
    **dict.fromkeys(("telefon", "address", "addr", "adresse", "anschrift", "street", "strasse", "zip"), "contact"),
    **dict.fromkeys(("zipcode", "postcode", "postalcode", "plz", "city", "town", "county", "ip", "website"), "contact"),
    **dict.fromkeys(("ssn", "socialsecurity", "socialsecuritynumber", "passport", "license", "licence"), "number"),
    **dict.fromkeys(("insurance", "insuranceid", "policy", "policynumber", "account", "accountnumber"), "number"),
    **dict.fromkeys(("serial", "serialnumber", "deviceserialnumber", "vin", "plate", "nationalid"), "number"),
    **dict.fromkeys(("dob", "dod", "birth", "born", "geburtstag", "death", "admission", "discharge"), "date"),
    **dict.fromkeys(("hospital", "institution", "clinic", "ward", "department"), "place"),
}

# What an id or a number may be of, in words that stand before it: `pt_id`, `block_no`, `caseSubmitterId`.
_NUMBERED = {
    "patient": r"^pt|^pat|case|hosp|hospital|chart|health|medicare|submitter|subject|subjectreading|participant|^tcga",
    "specimen": r"^acc|specimen|sample|aliquot|block|biopsy|^path|pathology|histo|histology|histologie|^lab|report"
    r"|order|request|journal|eingangs|procedure|procedurestep|study|encounter|visit|admission|episode|^plate|cassette",
    "slide": r"slide|wsi|^scan|svs",
    "person": r"user|contact|pathologist|annotator|rater|reader|physician|technician|operator|account",
    "number": r"device|scanner|serial|detector|gantry|generator|insurance|versicherten|versicherungs|karten|vehicle",
}
_NUMBER = r"(ids?|no|nr|nums?|numbers?|nummer)$"

# Any key with one of these in it; the first that is found counts.
_PARTS = (
    (re.compile(r"^(patient|subject)s?(age|sex|gender)$"), None),  # which tell little alone, and much of the picture
    (re.compile(r"patient|medicalrecord|krankenakte|hospitalnum|hospitalno"), "patient"),
    (re.compile(r"accession|specimenid|containerid|specimenuid|blockid"), "specimen"),
    (
        re.compile(r"^(slide|wsi|barcode)(no|num|number|label|file)|slidebarcode|slidelabel|^label(text|image)$"),
        "slide",
    ),
    (re.compile(r"birth|geburt|naissance|deceas|datetime|^date|date$|datum$|dateof|timestamp"), "date"),
    (re.compile(r"e?mail(address)?$|phone|telefon|telephone|mobilen|faxn|address|postal|zipcode"), "contact"),
    (
        re.compile(r"(first|last|given|family|full|maiden|middle|birth|person|nick|legal|display|user|real)names?$"),
        "person",
    ),
    (re.compile(r"physician|surgeon|clinician|doctor|operators?name|pathologistname|nextofkin|relative"), "person"),
    (
        re.compile(r"(mother|father|guardian|spouse|parent|referr(ing|er)|requester|author|reviewer|annotator)s?name"),
        "person",
    ),
    (
        re.compile(r"socialsecurity|passportn|insurance|license(no|num|plate)|accountn|serialn|policyn|nationalid"),
        "number",
    ),
    (re.compile(r"institution|hospitalname|clinicname|departmentname|stationname"), "place"),
    (re.compile(r"(instance|series|study|reference|device|irradiationevent|pyramid|object|dimension\w*)uid$"), "uid"),
    (re.compile(r"(image|file|pic|picture|photo)(name|path|file|url|uri|id)$"), "image"),
    (re.compile(r"mrn$|^mrn|^ssn|ssn$|^dob|dob$"), "number"),
    *((re.compile(rf"({stems}){_NUMBER}"), kind) for kind, stems in _NUMBERED.items()),
    (re.compile(r"submitter|barcode|identifier|identification|identifying|(placer|filler)order"), "specimen"),
    (re.compile(r"^(wsi|svs|scan)(name|path)"), "slide"),
    # Who did something, DICOM's attributes of persons, and names by their first letter.
    (re.compile(r"(ed|read|written)by$|^(owner|consultant|technician|spouse|guardian|rater|dr|gp)(name)?$"), "person"),
    (
        re.compile(
            r"(performer|observer|creator|evaluator|distribution|interpreter|recorder|transcriber|approver|author|operator"
            r"|technician|consultant|oncologist|radiologist|pathologist|customer)s?(name)?$|responsibleperson"
        ),
        "person",
    ),
    (re.compile(r"names?ofintended|^(pt|f|l|m)names?$|^name(first|last)|familiennam|authortrial"), "person"),
    (re.compile(r"^(?!.*(class|syntax|scheme|context|template|palette)).*uids?(list|infile|trial)?$"), "uid"),
    (re.compile(r"residence|latitude|longitude|^gps|institute$|(site|cent(er|re))(name|id)$|aetitle$"), "place"),
    (re.compile(r"addr\d?$|telecom|ipaddr|macaddr"), "contact"),
    (re.compile(r"datestamp|^yob$|^geb|militaryrank|occupation"), "date"),
    (re.compile("患者|病人|환자|пациент|病理号|住院号|门诊号|病历号|身份证|등록번호"), "patient"),
    (re.compile("姓名|氏名|이름|성명|^имя$|фамилия|^фио$"), "person"),
    (
        re.compile(r"^(hn|hcn|bsn|cpr|cpf|dni|rut|svnr|kvnr|aadhaar|ohip|person|codicefiscale|fiscalcode)(nummer)?$"),
        "number",
    ),
)
# DICOM's own number of an attribute, (0010,0020), 00100020, x00100020 or tag_0010_0020.
_DICOM_TAG = re.compile(r"(?:0?x|tag|dicom)?[0-9a-f]{8}")


@lru_cache(maxsize=4096)
def kind_of(key: str) -> str | None:
    """What kind of identifier a key holds, whatever its spelling; None if it holds none."""
    spelled = canonical(key)
    if (kind := IDENTIFYING_KEYS.get(spelled)) is not None:
        return kind
    if _DICOM_TAG.fullmatch(spelled) and any(letter.isdigit() for letter in spelled):
        return "dicom"
    return next((kind for part, kind in _PARTS if part.search(spelled)), None)
